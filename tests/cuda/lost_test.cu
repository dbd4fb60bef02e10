/* A GPU that is lost: every call of the CUDA runtime that opening a model and generating make fails in turn, and all
 * behind it. Each time there is an error object, all that was taken is given back, closing works, and the process goes
 * on with the CPU. The linker puts these functions in the place of the runtime's (Makefile: lost_LINK). */
#include <functional>
#include <stdio.h>
#include <string.h>

#include "machine.h"
extern "C" {
#include "../c/check.h"
#include "dg.h"
}

static int asked, lost_at,
    held; /* calls there were; the one that the GPU is lost at, 0: none; what was taken and not given back */
static const cudaError_t reasons[] = {cudaErrorLaunchFailure, cudaErrorECCUncorrectable, cudaErrorNoDevice,
                                      cudaErrorUnknown};

static bool lost() {
    asked++;
    if (lost_at && asked == lost_at) shim::lose();
    return lost_at && asked >= lost_at;
}
static cudaError_t reason() { return reasons[lost_at % 4]; }

#define REAL(name, parameters)            \
    cudaError_t __real_##name parameters; \
    cudaError_t __wrap_##name parameters
#define CALL(name, parameters, arguments) \
    REAL(name, parameters) { return lost() ? reason() : __real_##name arguments; }
#define TAKE(name, parameters, arguments)                                       \
    REAL(name, parameters) {                                                    \
        const cudaError_t status = lost() ? reason() : __real_##name arguments; \
        held += status == cudaSuccess;                                          \
        return status;                                                          \
    }
/* What was taken goes, whatever a driver still says. */
#define GIVE(name, type)                                \
    REAL(name, (type what)) {                           \
        const bool gone = lost();                       \
        held -= what != nullptr;                        \
        const cudaError_t status = __real_##name(what); \
        return gone ? reason() : status;                \
    }

extern "C" {
TAKE(cudaMalloc, (void **out, size_t n), (out, n))
TAKE(cudaHostAlloc, (void **out, size_t n, unsigned flags), (out, n, flags))
TAKE(cudaStreamCreateWithFlags, (cudaStream_t * out, unsigned flags), (out, flags))
TAKE(cudaEventCreateWithFlags, (cudaEvent_t * out, unsigned flags), (out, flags))
TAKE(cudaGraphInstantiate, (cudaGraphExec_t * out, cudaGraph_t g, unsigned long long flags), (out, g, flags))
GIVE(cudaFree, void *)
GIVE(cudaFreeHost, void *)
GIVE(cudaStreamDestroy, cudaStream_t)
GIVE(cudaEventDestroy, cudaEvent_t)
GIVE(cudaGraphExecDestroy, cudaGraphExec_t)
CALL(cudaGetDeviceCount, (int *n), (n))
CALL(cudaSetDevice, (int i), (i))
CALL(cudaDriverGetVersion, (int *v), (v))
CALL(cudaGetDeviceProperties, (cudaDeviceProp * p, int i), (p, i))
CALL(cudaDeviceGetAttribute, (int *v, cudaDeviceAttr a, int i), (v, a, i))
CALL(cudaDeviceGetPCIBusId, (char *id, int length, int i), (id, length, i))
CALL(cudaMemGetInfo, (size_t *left, size_t *all), (left, all))
CALL(cudaMemcpyAsync, (void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t s),
     (to, from, n, kind, s))
CALL(cudaMemcpy2DAsync,
     (void *to, size_t tp, const void *from, size_t fp, size_t w, size_t h, cudaMemcpyKind k, cudaStream_t s),
     (to, tp, from, fp, w, h, k, s))
CALL(cudaMemsetAsync, (void *p, int v, size_t n, cudaStream_t s), (p, v, n, s))
CALL(cudaLaunchHostFunc, (cudaStream_t s, cudaHostFn_t work, void *arg), (s, work, arg))
CALL(cudaStreamSynchronize, (cudaStream_t s), (s))
CALL(cudaStreamWaitEvent, (cudaStream_t s, cudaEvent_t e, unsigned flags), (s, e, flags))
CALL(cudaEventRecord, (cudaEvent_t e, cudaStream_t s), (e, s))
CALL(cudaEventSynchronize, (cudaEvent_t e), (e))
CALL(cudaStreamBeginCapture, (cudaStream_t s, cudaStreamCaptureMode mode), (s, mode))
CALL(cudaStreamEndCapture, (cudaStream_t s, cudaGraph_t *out), (s, out))
CALL(cudaGraphLaunch, (cudaGraphExec_t e, cudaStream_t s), (e, s))
/* shim::launch, of every kernel */
CALL(_ZN4shim6launchESt8functionIFvvEE4dim3S3_mP11CUstream_st,
     (std::function<void()> kernel, dim3 grid, dim3 block, size_t shared, cudaStream_t s),
     (std::move(kernel), grid, block, shared, s))
}

static const char *const file = "tests/fuzz/corpus/model/seed-q4_0";

struct outcome {
    int status;
    dg_error error;
    int32_t ids[32], n;
};

static int use(dg_model *m, outcome *to) {
    const int32_t prompt[] = {2, 7, 8, 9, 7};
    float logits[16];
    dg_session *s = nullptr;
    dg_result *r = nullptr;
    dg_sampling o;
    dg_sampling_default(m, &o);
    o.steps = 3, o.max_tokens = 16, o.confidence = 0.0f;
    int status = dg_session_new(m, 40, &s, &to->error);
    if (status == DG_OK) status = dg_encode(s, prompt, 5, DG_LOGITS_LAST, logits, &to->error);
    if (status == DG_OK) status = dg_generate(s, &o, nullptr, nullptr, &r, &to->error);
    if (status == DG_OK)
        to->n = r->n_ids < 32 ? r->n_ids : 32, memcpy(to->ids, r->ids, static_cast<size_t>(to->n) * sizeof *to->ids);
    dg_result_free(r);
    dg_session_free(s);
    return status;
}

static outcome generate(const char *backend) {
    outcome o = {};
    dg_model_options options = {};
    options.backend = backend, options.threads = 1;
    dg_model *m = nullptr;
    o.status = dg_model_open(file, &options, &m, &o.error);
    if (o.status == DG_OK) o.status = use(m, &o);
    dg_model_free(m);
    return o;
}

static bool same(const outcome &a, const outcome &b) {
    return a.status == b.status && a.n == b.n && memcmp(a.ids, b.ids, static_cast<size_t>(a.n) * sizeof *a.ids) == 0;
}

int main(int argc, char **argv) {
    const int most = argc > 1 && strcmp(argv[1], "plain") ? 40 : 250; /* under the checkers, fewer */
    const outcome cpu = generate("cpu"), gpu = generate("cuda");
    CHECK(cpu.status == DG_OK && gpu.status == DG_OK, "%s%s", cpu.error.message, gpu.error.message);
    asked = 0;
    generate("cuda");
    const int calls = asked;
    CHECK(calls > 100 && held == 0, "%d calls, %d things kept", calls, held);
    int refused = 0, n = 1;
    for (int round = 0; n <= calls; n += 1 + (++round > most / 2 ? (calls - n) / (most - round + 1)
                                                                 : 0)) { /* each of the first, some of the rest */
        asked = 0, lost_at = n;
        const outcome o = generate("cuda");
        lost_at = 0;
        const bool opened_only = o.status == DG_OK; /* it was lost while the model was closed, after the tokens */
        CHECK(opened_only ? same(o, gpu) : o.status == DG_ERROR_BACKEND || o.status == DG_ERROR_MEMORY,
              "lost at call %d of %d: status %d", n, calls, o.status);
        CHECK(opened_only || (o.error.status == o.status && o.error.message[0]), "lost at call %d of %d: no message", n,
              calls);
        CHECK(held == 0, "lost at call %d of %d: %d things are kept", n, calls, held);
        held = 0;
        refused += !opened_only;
        if (round % 16 == 0)
            CHECK(same(generate("cpu"), cpu), "lost at call %d of %d: the CPU makes other tokens", n, calls);
    }
    CHECK(refused > 30, "only %d losses were noticed", refused);
    CHECK(same(generate("cuda"), gpu), "once it is back, the GPU makes other tokens");
    printf("cuda lost: %d calls, lost at %s of them\n", calls, calls <= most ? "each" : "some");
    return check_done("cuda lost");
}
