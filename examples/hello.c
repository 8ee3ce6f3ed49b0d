/* An associative memory in C99: write a value under each of eight keys, then read them back in reverse order. */
#define _ISOC11_SOURCE /* aligned_alloc */
#include <flashdelta/flashdelta.h>
#include <stdio.h>
#include <stdlib.h>

enum { K = 8, V = 8, T = 2 * K }; /* K tokens that write, K tokens that read */

int main(void) {
  static float q[T][K], k[T][K], v[T][V], beta[T], o[T][V];
  for (int t = 0; t < K; ++t) {
    k[t][t] = 1; /* write: key t, value t + 1 */
    beta[t] = 1;
    for (int c = 0; c < V; ++c) v[t][c] = (float)(t + 1);
    q[K + t][K - 1 - t] = 1; /* read: beta is 0, so nothing is written */
  }

  fd_problem problem = {0};
  problem.size = sizeof problem;
  problem.B = 1;
  problem.T = T;
  problem.H = problem.HV = 1;
  problem.K = K;
  problem.V = V;
  problem.scale = 1;
  problem.beta = FD_BETA_VALUE;

  fd_forward_args args = {0};
  args.size = sizeof args;
  args.problem = &problem;
  args.q.data = q;
  args.k.data = k;
  args.v.data = v;
  args.beta.data = beta;
  args.o.data = o;

  size_t bytes = 0;
  void* workspace = NULL;
  fd_status status = fd_forward_workspace(&problem, &bytes);
  if (status == FD_OK && bytes > 0) {
    workspace = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (workspace == NULL) return 1;
  }
  if (status == FD_OK) status = fd_forward(&args, workspace, bytes, NULL);
  free(workspace);
  if (status != FD_OK) {
    fprintf(stderr, "%s: %s\n", fd_status_name(status), fd_last_error());
    return 1;
  }

  int wrong = 0;
  for (int t = 0; t < K; ++t) {
    printf("key %d -> %g\n", K - 1 - t, o[K + t][0]);
    for (int c = 0; c < V; ++c) wrong += o[K + t][c] < (float)(K - t) - 1e-5F || o[K + t][c] > (float)(K - t) + 1e-5F;
  }
  return wrong != 0;
}
