/* The operations a forward pass is made of, as a table that a backend fills (ops.def says what each does). */
#ifndef DG_OPS_H
#define DG_OPS_H

#include "canvas.h"
#include "os.h"
#include "self_condition.h"
#include "weights.h"

typedef struct ops ops;

/* What n queries attend to. Key rows [0, count) stand at positions 0, 1, ...; query i stands at first + i. */
typedef struct attention_keys {
    const void *k, *v;  /* [count][n_kv][dim], as the store op wrote them */
    int64_t n_kv;       /* query head h reads KV head h * n_kv / n_head */
    int64_t first;
    int64_t count;
    bool causal;        /* query i sees keys up to its own position, and of those the last `window` */
    int64_t window;     /* 0: no bound. not causal: every query sees keys first - window + 1 .. count - 1 */
} attention_keys;

/* The keys that query i sees: [*from, *to). */
static inline void attention_span(const attention_keys *a, int64_t i, int64_t *from, int64_t *to) {
    int64_t at = a->causal ? a->first + i : a->first;
    *to = a->causal ? at + 1 : a->count;
    *from = a->window && at - a->window + 1 > 0 ? at - a->window + 1 : 0;
}

/* n rows that go through the head together with others: */
typedef struct head_part {
    int64_t n;
    const float *temperature;
    const double *u; /* [n] */
    dg_choice *out;  /* [n] as choose has it, over softcapped logits divided by *temperature */
    self_cond *next;      /* what self_condition needs */
} head_part;

/* Hands out the experts of a layer that are not all in memory at once. next writes the numbers of some to
 * out[n_expert] and returns how many, 0 when each was handed out once; their matrices then lie where the tensors'
 * `at` says, and those of the call before may be gone. */
typedef struct expert_feed {
    int32_t (*next)(void *self, int32_t *out);
    void *self;
} expert_feed;

/* The plan by which a backend with memory of its own keeps the experts of layers[n_layer]: of a layer's n_expert, in
 * the order of `order`, the first pinned[l] lie there, the next streamed[l] are copied there by every pass, through
 * `slots` buffers of slot_bytes, and the others are computed by the CPU at the same time, for up to `rows` rows at
 * once. */
typedef struct expert_plan {
    const layer *layers;
    int32_t n_layer, n_expert, n_expert_used;
    const int32_t *order;             /* [n_layer][n_expert]: the numbers of a layer's experts, each once */
    const int32_t *pinned, *streamed; /* [n_layer] */
    int64_t slot_bytes;
    int32_t slots;
    int64_t rows;
} expert_plan;

/* One expert in one piece: gate, up and down, each behind a whole number of EXPERT_LINEs and with as much room again at
 * its end, into which loads may run over. Returns the bytes of it all. */
enum { EXPERT_LINE = 256 };
static inline int64_t expert_layout(const layer *w, int64_t at[3]) {
    const tensor *const each[] = {&w->ffn_gate_exps, &w->ffn_up_exps, &w->ffn_down_exps};
    int64_t bytes = 0;
    for (int i = 0; i < 3; i++) {
        at[i] = bytes;
        bytes += (each[i]->rows * each[i]->row_bytes + EXPERT_LINE - 1) / EXPERT_LINE * EXPERT_LINE + EXPERT_LINE;
    }
    return bytes;
}

/* A recorded list of operations; the backend defines it. */
typedef struct recording {
    void *graph;
} recording;

/* Each op's type: op_matmul, ... */
#define DG_OP(name, arguments, names) typedef void(*op_##name) arguments;
#include "ops.def"
#undef DG_OP

/* The operations alone. */
typedef struct op_table {
#define DG_OP(name, arguments, names) op_##name name;
#include "ops.def"
#undef DG_OP
} op_table;

/* The layers over the operations (op_layers.h), from the backend up: the profile's times and counts are those of
 * operations as they are called. */
typedef enum op_layer_id { OP_LAYER_ACTIVATION_STATS, OP_LAYER_PROFILE, OP_LAYERS } op_layer_id;

/* A backend: a row of backends.c. Functions that may be NULL are those of what it does not have. */
typedef struct ops_backend {
    const char *name;           /* as options ask for it */
    bool (*usable)(void);       /* this build and this machine have it; NULL: always */
    bool explains;              /* open says why where it is not usable */
    bool own_memory;            /* ops work in memory of its own, and experts that it does not hold are the CPU's */
    bool asynchronous;          /* ops return before their work is done; download waits for it */
    bool lazy;                  /* reserved memory that is never touched costs nothing */
    /* Fills the table, and its name where that says more than the row's. exact: activations are never rounded. */
    int (*open)(ops *o, bool exact, dg_error *error);
    void (*close)(ops *o);      /* may be NULL; called also where open failed */
    int (*status)(const ops *o, dg_error *error); /* may be NULL: ops cannot fail */
    /* May be NULL: ops_repack, with memory[bytes] for the caller to release. */
    int (*repack)(const ops *o, layer *layers, int32_t n_layer, int64_t budget, uint8_t **memory, size_t *bytes,
                  dg_error *error);
    /* May be NULL: as the functions of ops_ below. */
    bool (*overlap_watch)(const ops *o, bool watch);
    bool (*overlap_read)(const ops *o, dg_overlap *out);
    bool (*measure)(const ops *o, dg_device_rates *out);
    void (*rated)(const ops *o, dg_machine *machine);
} ops_backend;

struct ops {
    char name[64];
    const ops_backend *backend;
    int32_t key_bytes;    /* of a number in a cache of keys or values */
    void *device;         /* the backend's own */
    const ops *beside;    /* where the backend has memory of its own: the CPU's table, with the same pool */
    pool *pool;
    float *scratch;       /* [threads][scratch_floats], 64-byte aligned; each thread's own while an op runs */
    int64_t scratch_floats;
    struct op_layer *layers[OP_LAYERS]; /* those that are on; else NULL */
#define DG_OP(name, arguments, names) op_##name name;
#include "ops.def"
#undef DG_OP
    /* With integer products: their kernels, and the float32 ops that serve formats without one. */
    const struct gemm_set *gemm;
    op_matmul float_matmul;
    op_experts float_experts;
    op_head float_head;
    op_self_condition float_self_condition;
    uint8_t *repacked; /* ops_repack's copies */
    size_t repacked_bytes;
    _Atomic double longest; /* length of the embedding's longest row, 0 until someone asked */
    float tolerance;        /* dg_model_options' */
};

/* Whether a layer watches each operation: then a backend does each by itself, and neither records nor replays any. */
static inline bool ops_layered(const ops *o) {
    for (int i = 0; i < OP_LAYERS; i++)
        if (o->layers[i]) return true;
    return false;
}

/* Makes the table of the backend that the options ask for, with a pool of its own. */
int ops_new(const dg_model_options *options, const dg_config *config, ops **out, dg_error *error);
/* The i-th name of a backend that has memory of its own, whether it can be used here or not; NULL past the end. */
const char *ops_with_vram(int32_t i);
void ops_free(ops *o);
/* As dg_overlap_watch and dg_overlap_read; false where there is no device, or nothing placed on it yet. */
bool ops_overlap_watch(const ops *o, bool watch);
bool ops_overlap_read(const ops *o, dg_overlap *out);
/* As dg_device_measure. */
bool ops_device_measure(const ops *o, dg_device_rates *out);
/* A device's rates as its data sheet and its link have them, which no run changes; what they do not tell stays as it
 * is. */
void ops_device_rated(const ops *o, dg_machine *machine);
int64_t ops_scratch_bytes(const ops *o); /* of all threads */

/* The first failure since the table was made, if there was one. */
int ops_status(const ops *o, dg_error *error);

/* Copies the matrices of whole experts, in the order of the layers and as many as `budget` bytes hold, in a form
 * that is unpacked faster, lets go of the file's pages, and points the layers' tensors to the copies, which are the
 * table's. Results keep their bits. */
int ops_repack(ops *o, layer *layers, int32_t n_layer, int64_t budget, dg_error *error);

/* Bytes of work that the matmul op needs for n rows of up to `cols` columns, the self_condition and the experts op. */
size_t matmul_work(int64_t n, int64_t cols);
size_t self_condition_work(int64_t n, int64_t d_model);
size_t experts_work(int64_t n, int64_t k, int64_t d_model, int64_t d_expert, int64_t n_expert);

#endif
