/* flashdelta: the gated delta rule (Gated DeltaNet) on CPUs and NVIDIA GPUs. C99; the only binary contract of the library.
 *
 * Per value head, with state S (K x V), log-gate g_t <= 0 and write strength beta_t (docs/math.md):
 *
 *     S_t = exp(g_t) S_{t-1} + k_t beta_t (v_t - exp(g_t) S_{t-1}^T k_t)^T
 *     o_t = scale * S_t^T q_t
 *
 * Three operations: fd_forward (whole sequences), fd_backward (its gradients), fd_step (a few tokens per sequence,
 * decoding).
 *
 * Conventions
 *  - Letters: B batch, T tokens, N sequences, H query/key heads, HV = G * H value heads (value head hv reads query/key head
 *    hv / G), K and V head dims, P rows of a pool of states, S slots (columns) of an index tensor.
 *  - Zero means absent or default in every member: set a struct to zero, set `size`, fill in what you need.
 *  - Structs with a `size` member grow: a smaller struct of an older caller reads as if the rest were zero; in a larger one
 *    of a newer caller the bytes this library does not know must be zero (else FD_UNSUPPORTED). fd_tensor and fd_index are
 *    frozen.
 *  - Nothing is silently ignored: an option that no backend can serve is FD_UNSUPPORTED, and fd_last_error() says why.
 *  - The library never allocates device memory, never synchronises, never reads device memory on the host, and is safe to
 *    call from several threads. Workspace contents are undefined on entry and on return; it must be aligned to 256 bytes.
 *  - On CUDA everything is enqueued on `stream` (a cudaStream_t; null: the default stream) of the calling thread's current
 *    device; on the CPU the call returns when the work is done and `stream` must be null.
 *  - What lies on a CUDA device cannot be checked: there cu_seqlens are clamped to [0, T] and to non-decreasing, and an
 *    index outside its pool counts as -1. On the CPU both are errors.
 */
#ifndef FLASHDELTA_FLASHDELTA_H
#define FLASHDELTA_FLASHDELTA_H

#include <stddef.h>
#include <stdint.h>

#define FD_VERSION_MAJOR 0
#define FD_VERSION_MINOR 1
#define FD_VERSION_PATCH 0

#if defined(FD_STATIC)
#define FD_API
#elif defined(__GNUC__)
#define FD_API __attribute__((visibility("default")))
#else
#define FD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns; only FD_OK is zero. fd_last_error() has the words. */
typedef int32_t fd_status;
enum {
  FD_OK = 0,
  FD_INVALID = 1,      /* the call is wrong: shapes, strides, null pointers, short or overlapping buffers */
  FD_UNSUPPORTED = 2,  /* the call is right, but no backend here can serve it */
  FD_DEVICE_ERROR = 3, /* the device or its driver reported an error */
  FD_OUT_OF_MEMORY = 4 /* the host could not give the few bytes of bookkeeping a call needs */
};

/* Element types. Their numbers never change. */
typedef int32_t fd_dtype;
enum { FD_FLOAT32 = 0, FD_BFLOAT16 = 1, FD_FLOAT16 = 2, FD_FLOAT64 = 3 };

/* Element types of cu_seqlens and of index tensors. */
typedef int32_t fd_index_dtype;
enum { FD_INT64 = 0, FD_INT32 = 1 };

/* Where every pointer of a call lies. */
typedef int32_t fd_device;
enum { FD_CPU = 0, FD_CUDA = 1 };

/* What the gate tensor g holds. */
typedef int32_t fd_gate;
enum {
  FD_GATE_NONE = 0,       /* no decay; g absent */
  FD_GATE_LOG = 1,        /* g: natural-log decay per token, <= 0 */
  FD_GATE_RAW = 2,        /* g: raw projection a; the log decay is -exp(A_log) * softplus(a + dt_bias) */
  FD_GATE_LOG_PER_KEY = 3 /* g: [B, T, HV, K]; reserved, no backend has it yet */
};

/* What the tensor beta holds. */
typedef int32_t fd_beta;
enum {
  FD_BETA_ONE = 0,   /* write strength 1; beta absent */
  FD_BETA_VALUE = 1, /* the write strength, in [0, 1], or up to 2 (negative eigenvalues) */
  FD_BETA_LOGIT = 2  /* its logit: the write strength is sigmoid(beta), doubled with allow_neg_eigval */
};

/* Whether a long sequence may be split over the device: where it seems to pay, wherever it can be, or never. Results of
 * `off` do not depend on the rest of the batch. Backends that never split a sequence take all three. */
typedef int32_t fd_context_parallel;
enum { FD_CONTEXT_AUTO = 0, FD_CONTEXT_ON = 1, FD_CONTEXT_OFF = 2 };

/* Which implementation serves a call; numbers never change. fd_backend_get() lists those compiled in. */
typedef int32_t fd_backend;
enum {
  FD_BACKEND_AUTO = 0,      /* the first of the list that supports the problem */
  FD_BACKEND_REFERENCE = 1, /* float64 token recurrence on the CPU: slow, the definition of correct */
  FD_BACKEND_CPU = 2,       /* chunked, vectorised, threaded */
  FD_BACKEND_CUDA = 3,      /* any NVIDIA GPU the library was compiled for: decode step */
  FD_BACKEND_SM90 = 4       /* NVIDIA Hopper */
};

/* A strided tensor. Frozen. Strides count elements; all strides zero: contiguous in the order of the shape given at the
 * member. Members past the tensor's rank are ignored, as are strides of dimensions of size 1. Innermost stride must be 1
 * (gates, write strengths and per-head vectors: any). Outputs must not repeat elements (no stride 0). */
typedef struct fd_tensor {
  void* data; /* null: absent */
  int64_t stride[4];
} fd_tensor;

/* A strided index tensor, [N] or [N, S]. Frozen. Strides count elements; both zero: contiguous. */
typedef struct fd_index {
  const void* data; /* null: absent */
  int64_t stride[2];
} fd_index;

/* Shapes, element types and options of one call; no pointers. Plans and workspace sizes follow from it alone (T and N count
 * as capacities). Growable. */
typedef struct fd_problem {
  size_t size;                     /* sizeof(fd_problem) */
  int64_t B;                       /* batch; 1 for packed sequences */
  int64_t T;                       /* tokens of one batch entry */
  int64_t N;                       /* packed sequences, their ends in cu_seqlens; 0: not packed, B sequences of T tokens */
  int64_t H;                       /* query and key heads */
  int64_t HV;                      /* value heads, a multiple of H */
  int64_t K;                       /* head dim of q and k */
  int64_t V;                       /* head dim of v and o */
  int64_t initial_rows;            /* P of initial_state; 0: one row per sequence */
  int64_t final_rows;              /* P of final_state; 0: one row per sequence */
  int64_t checkpoint_rows;         /* P of checkpoints */
  int64_t initial_slots;           /* S of initial_index; 0: the index is [N] */
  int64_t final_slots;             /* S of final_index; 0: the index is [N] */
  int64_t checkpoint_slots;        /* S of checkpoint_index */
  int64_t checkpoint_interval;     /* tokens between checkpoints, a multiple of 64; 0: none */
  double scale;                    /* of o; 0: K^-0.5 */
  double l2norm_eps;               /* added to the sum of squares; 0: 1e-6 */
  double context_bound;            /* error bound of the gate-driven shortcut; 0: 2^-20; negative: exact */
  fd_device device;                /* where every pointer lies */
  fd_backend backend;              /* which implementation; 0: the best that fits */
  fd_dtype dtype;                  /* q, k, v, o and their gradients */
  fd_dtype gate_dtype;             /* g, dg */
  fd_dtype beta_dtype;             /* beta, dbeta */
  fd_dtype A_log_dtype;            /* A_log, dA_log */
  fd_dtype dt_bias_dtype;          /* dt_bias, ddt_bias */
  fd_dtype initial_dtype;          /* initial_state, dinitial_state */
  fd_dtype final_dtype;            /* final_state, dfinal_state */
  fd_dtype checkpoint_dtype;       /* checkpoints */
  fd_index_dtype cu_seqlens_dtype; /* cu_seqlens */
  fd_index_dtype index_dtype;      /* every fd_index and accepted */
  fd_gate gate;                    /* what g holds */
  fd_beta beta;                    /* what beta holds */
  int32_t qk_l2norm;               /* 1: q and k are divided by sqrt(sum of squares + l2norm_eps), in fp32 */
  int32_t allow_neg_eigval;        /* 1: write strength 2 * sigmoid(beta); only with FD_BETA_LOGIT */
  int32_t state_v_first;           /* 1: states are [.., HV, V, K] instead of [.., HV, K, V] */
  fd_context_parallel context_parallel;
  int32_t threads;         /* CPU threads; 0: OpenMP's default. Results do not depend on it */
  int32_t reserved;        /* must be 0 */
  int64_t workspace_limit; /* bytes a backward's workspace should not exceed: it works in more passes over less memory; a
                              backend takes the least it can if that is more. Results do not depend on it. 0: 640 MiB */
} fd_problem;

/* States and their rows. Sequence n starts from row initial_index[n] of initial_state (without an index: row n; absent or
 * -1: zero) and its last state goes to row final_index[n] of final_state (without: row n; absent or -1: nothing written).
 * final_state may be the same memory as initial_state: rows are then updated in place. Written rows must be distinct, and a
 * row that is written may be read only by the sequence that writes it. A sequence of length zero passes its state through.
 * Rows of tokens past cu_seqlens[N] are read by nobody; in outputs and gradients they are written as zero. */
typedef struct fd_forward_args {
  size_t size;               /* sizeof(fd_forward_args); growable */
  const fd_problem* problem; /* shapes and options */
  fd_tensor q;               /* [B, T, H, K] */
  fd_tensor k;               /* [B, T, H, K] */
  fd_tensor v;               /* [B, T, HV, V] */
  fd_tensor g;               /* [B, T, HV], see fd_gate */
  fd_tensor beta;            /* [B, T, HV], see fd_beta */
  fd_tensor A_log;           /* [HV], FD_GATE_RAW only */
  fd_tensor dt_bias;         /* [HV], FD_GATE_RAW only; absent: zero */
  const void* cu_seqlens;    /* [N + 1], contiguous, if N > 0 */
  fd_tensor initial_state;   /* [P, HV, K, V]; absent: zero */
  fd_index initial_index;    /* [N] */
  fd_tensor o;               /* [B, T, HV, V], written */
  fd_tensor final_state;     /* [P, HV, K, V], rows written; absent: not wanted */
  fd_index final_index;      /* [N] */
  fd_tensor checkpoints;     /* [P, HV, K, V], rows written */
  fd_index checkpoint_index; /* [N, S]: the state after (s + 1) * checkpoint_interval tokens of sequence n goes to this row;
                                -1 or past the slots: not written */
  void* saved;               /* what fd_backward can reuse, fd_forward_saved() bytes; null: nothing is kept */
  size_t saved_bytes;
} fd_forward_args;

/* Gradients of fd_forward. An absent output gradient counts as zero (one of do_ and dfinal_state must be given); an absent
 * result is not computed. Gradients of q and k are summed over the value heads that share them, those of A_log and dt_bias
 * over all tokens in a fixed order. States must not be updated in place. */
typedef struct fd_backward_args {
  size_t size;               /* sizeof(fd_backward_args); growable */
  const fd_problem* problem; /* as of the forward call */
  fd_tensor q;               /* as of the forward call, to initial_index */
  fd_tensor k;
  fd_tensor v;
  fd_tensor g;
  fd_tensor beta;
  fd_tensor A_log;
  fd_tensor dt_bias;
  const void* cu_seqlens;
  fd_tensor initial_state;
  fd_index initial_index;
  fd_tensor do_;          /* [B, T, HV, V], gradient of o */
  fd_tensor dfinal_state; /* [N, HV, K, V], gradient of the final states (row n: sequence n) */
  const void* saved;      /* as filled by fd_forward of the same problem and inputs; null: recomputed */
  size_t saved_bytes;
  fd_tensor dq;             /* [B, T, H, K], written */
  fd_tensor dk;             /* [B, T, H, K], written */
  fd_tensor dv;             /* [B, T, HV, V], written */
  fd_tensor dg;             /* [B, T, HV], written; with FD_GATE_RAW the gradient of a */
  fd_tensor dbeta;          /* [B, T, HV], written; with FD_BETA_LOGIT the gradient of the logit */
  fd_tensor dA_log;         /* [HV], written */
  fd_tensor ddt_bias;       /* [HV], written */
  fd_tensor dinitial_state; /* [N, HV, K, V], written (row n: sequence n); zero where the index was -1 */
} fd_backward_args;

/* A few tokens per sequence, one after another (decoding): the state is read and written once. Sequences may be packed.
 * Speculative decoding: with final_slots > 0 the state after token t of sequence n goes to row final_index[n, t] (-1 or
 * t >= final_slots: not written) instead of the last state to final_index[n]; with `accepted`, sequence n starts from row
 * initial_index[n, accepted[n] - 1], the state after the last token accepted of the call before (accepted[n] outside
 * [1, initial_slots] counts as index -1; on the CPU it is an error). */
typedef struct fd_step_args {
  size_t size;               /* sizeof(fd_step_args); growable */
  const fd_problem* problem; /* shapes and options */
  fd_tensor q;               /* as fd_forward_args, to final_index */
  fd_tensor k;
  fd_tensor v;
  fd_tensor g;
  fd_tensor beta;
  fd_tensor A_log;
  fd_tensor dt_bias;
  const void* cu_seqlens;
  fd_tensor initial_state;
  fd_index initial_index; /* [N] or [N, S] */
  fd_tensor o;
  fd_tensor final_state;
  fd_index final_index; /* [N] or [N, S] */
  const void* accepted; /* [N], contiguous, of index_dtype; absent: slot 0 is read */
} fd_step_args;

/* One entry of the list of backends, best first. Growable. The strings live as long as the library. */
typedef struct fd_backend_description {
  size_t size; /* sizeof(fd_backend_description), set by the caller */
  fd_backend backend;
  fd_device device;
  int32_t available; /* 1: it can run on this machine */
  int32_t reserved;
  const char* name;   /* "sm90", "cpu", ... */
  const char* detail; /* what it runs on, or why it is not available */
} fd_backend_description;

/* Major * 10000 + minor * 100 + patch of the library that is loaded. */
FD_API int32_t fd_version(void);

/* What went wrong in the last failing call of this thread, naming tensor, dimension, what it got and what it expected:
 * "fd_forward: v has 7 heads (HV); must be a multiple of q's 4 (H)". Empty before the first failure; valid until the
 * thread's next failing call. */
FD_API const char* fd_last_error(void);

/* "FD_OK", "FD_INVALID", ...; "unknown status" for other numbers. */
FD_API const char* fd_status_name(fd_status status);

/* Number of backends compiled in, available or not. */
FD_API int32_t fd_backend_count(void);

/* Describes backend number `i` of the list, best first. FD_INVALID for an `i` outside [0, fd_backend_count()). */
FD_API fd_status fd_backend_get(int32_t i, fd_backend_description* description);

/* Which backend serves this problem's operation: its number, and FD_UNSUPPORTED with the reasons if none does. */
FD_API fd_status fd_forward_backend(const fd_problem* problem, fd_backend* backend);
FD_API fd_status fd_backward_backend(const fd_problem* problem, fd_backend* backend);
FD_API fd_status fd_step_backend(const fd_problem* problem, fd_backend* backend);

/* Bytes of workspace the operation needs for this problem, may be 0. Pure: the same problem gives the same answer. */
FD_API fd_status fd_forward_workspace(const fd_problem* problem, size_t* bytes);
FD_API fd_status fd_backward_workspace(const fd_problem* problem, size_t* bytes);
FD_API fd_status fd_step_workspace(const fd_problem* problem, size_t* bytes);

/* Bytes of fd_forward_args.saved for this problem, may be 0 (then pass null). */
FD_API fd_status fd_forward_saved(const fd_problem* problem, size_t* bytes);

/* Run one operation. `workspace` has `workspace_bytes` bytes on the operation's device, at least what the query says; it
 * must not overlap any tensor. After any status but FD_OK and FD_DEVICE_ERROR no output has been touched. */
FD_API fd_status fd_forward(const fd_forward_args* args, void* workspace, size_t workspace_bytes, void* stream);
FD_API fd_status fd_backward(const fd_backward_args* args, void* workspace, size_t workspace_bytes, void* stream);
FD_API fd_status fd_step(const fd_step_args* args, void* workspace, size_t workspace_bytes, void* stream);

#ifdef __cplusplus
}
#endif
#endif
