# Stages with their times: `stage NAME COMMAND...` runs one, `stages_end` prints the table and returns 1 if any failed.
stages_passed=0
stages_failed=0
stages_table=""

stage() {
  local name=$1 start=$SECONDS result=passed
  shift
  printf '\n=== %s\n' "$name"
  if "$@"; then
    stages_passed=$((stages_passed + 1))
  else
    result=FAILED
    stages_failed=$((stages_failed + 1))
  fi
  stages_table+=$(printf '%-60s %-7s %5d s' "$name" "$result" $((SECONDS - start)))$'\n'
}

stages_end() {
  printf '\n%s%-60s %-7s %5d s\n\n' "$stages_table" total "" $SECONDS
  printf 'stages: %d passed, %d failed\n' "$stages_passed" "$stages_failed"
  [ "$stages_failed" = 0 ]
}
