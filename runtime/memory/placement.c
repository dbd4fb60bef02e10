/* Decides where experts are kept and where they are computed (placement.h has the model of time).
 *
 * Layers with blocks of the same size are a class. The shares of a layer's experts are the unknowns of a linear
 * program, which is solved for each useful depth of the rings. Its solution is rounded down to whole blocks, and the
 * memory that this leaves is given to the layers that become faster by it.
 */
#include "placement.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

#define GIB 1073741824.0
#define MIB (1 << 20)
enum {
    VRAM_PROCESS = 384 * MIB, /* bytes for driver and kernels */
    RING_LEAST = 4,           /* blocks: one is being filled, one is used, and two absorb variations */
    RING_GOOD = 128 * MIB,    /* bytes; in a smaller ring reads are short, and the disk waits for the computation */
    RING_SHARE = 32,          /* all experts / RING_SHARE is used instead of RING_GOOD where it is less */
    MOST_CLASSES = 16,        /* a real file has two or three sizes of blocks */
    RING_DEPTHS = 8,          /* depths to try: RING_LEAST, twice that, and so on; also no ring */
};

/* ---- Lists ---- */

static const dg_rate rates[] = {
#define DG_RATE(name, text, one, may_lack, about) \
    {.field = #name, .unit = text, .scale = one, .optional = may_lack, .help = about},
#include "plan.def"
};
static const size_t rate_offsets[] = {
#define DG_RATE(field, unit, scale, optional, help) offsetof(dg_machine, field),
#include "plan.def"
};
static const dg_way_entry ways[] = {
#define DG_WAY(name, where, by, text) {.lives = where, .computed = by, .how = text},
#include "plan.def"
};
static const dg_queue_entry queues[] = {
#define DG_QUEUE(id, text, about) {.name = text, .covers = about},
#include "plan.def"
};
static const dg_machine machines[] = {
#define DG_MACHINE(id, text, ram_gib, vram_gib, disk_gb, host_gb, pcie_gb, gpu_gb, cpu_gops, gpu_gops, from) \
    {                                                                                                        \
        .name = id,                                                                                          \
        .about = text,                                                                                       \
        .source = from,                                                                                      \
        .ram = ram_gib * GIB,                                                                                \
        .vram = vram_gib * GIB,                                                                              \
        .disk = disk_gb * 1e9,                                                                               \
        .host = host_gb * 1e9,                                                                               \
        .pcie = pcie_gb * 1e9,                                                                               \
        .gpu = gpu_gb * 1e9,                                                                                 \
        .cpu_ops = cpu_gops * 1e9,                                                                           \
        .gpu_ops = gpu_gops * 1e9,                                                                           \
    },
#include "machines.def"
#undef DG_MACHINE
};

#define AT(list, i) ((i) >= 0 && (size_t)(i) < sizeof(list) / sizeof *(list) ? &(list)[i] : NULL)
const dg_rate *dg_rate_at(int32_t i) { return AT(rates, i); }
const dg_way_entry *dg_way_at(int32_t i) { return AT(ways, i); }
const dg_queue_entry *dg_queue_at(int32_t i) { return AT(queues, i); }
const dg_machine *dg_machine_at(int32_t i) { return AT(machines, i); }

static double larger(double a, double b) { return a > b ? a : b; }
static double smaller(double a, double b) { return a < b ? a : b; }
static int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- The order of experts ---- */

void placement_order(const int64_t *tokens, int32_t n, int32_t *order) {
    for (int32_t e = 0; e < n; e++) { /* insertion */
        int32_t at = e;
        for (; at > 0 && tokens[order[at - 1]] < tokens[e]; at--) order[at] = order[at - 1];
        order[at] = e;
    }
}

/* ---- The model of time ---- */

/* Whether CPU and GPU both compute in a layer, so that inputs and results are copied between them. */
static bool hands_over(const int32_t count[DG_WAYS], bool gpu) {
    return gpu && count[DG_WAY_RAM_CPU] + count[DG_WAY_DISK_CPU] > 0;
}

/* Computes the bytes or operations of each queue for one layer. count: the layer's blocks by way. */
static void layer_amounts(const dg_demand *d, bool gpu, int32_t l, const int32_t count[DG_WAYS],
                          double amount[DG_QUEUES]) {
    const double bytes = (double)d->block_bytes[l], work = d->block_ops;
    const double disk = count[DG_WAY_DISK_GPU] + count[DG_WAY_DISK_CPU],
                 copied = count[DG_WAY_RAM_GPU] + count[DG_WAY_DISK_GPU];
    const double kept = count[DG_WAY_RAM_GPU] + count[DG_WAY_RAM_CPU], on_gpu = copied + count[DG_WAY_VRAM];
    amount[DG_QUEUE_DISK] = disk * bytes;
    amount[DG_QUEUE_HOST] = (kept + 2 * disk) * bytes; /* blocks from the disk are written to memory, then read */
    amount[DG_QUEUE_PCIE] = copied * bytes + (hands_over(count, gpu) ? (double)d->pass_bytes : 0.0);
    amount[DG_QUEUE_CPU] = (count[DG_WAY_RAM_CPU] + count[DG_WAY_DISK_CPU]) * work;
    amount[DG_QUEUE_GPU] = on_gpu * work;
    amount[DG_QUEUE_GPU_MEMORY] = on_gpu * bytes;
}

static double seconds_of(const dg_machine *m, int32_t queue, double amount) {
    const double rate[DG_QUEUES] = {
        [DG_QUEUE_DISK] = m->disk,   [DG_QUEUE_HOST] = m->host,   [DG_QUEUE_PCIE] = m->pcie,
        [DG_QUEUE_CPU] = m->cpu_ops, [DG_QUEUE_GPU] = m->gpu_ops, [DG_QUEUE_GPU_MEMORY] = m->gpu,
    };
    return amount > 0 ? amount / rate[queue] : 0.0;
}

/* The seconds for work that is not experts: operations `work`, or reading `bytes`, whichever takes longer. */
static double serial_time(const dg_machine *m, bool gpu, double work, double bytes) {
    return larger(seconds_of(m, gpu ? DG_QUEUE_GPU : DG_QUEUE_CPU, work),
                  seconds_of(m, gpu ? DG_QUEUE_GPU_MEMORY : DG_QUEUE_HOST, bytes));
}

/* The seconds of a queue's work for a layer that are done before the layer's experts begin: limited by the ring. */
static double head_start(const dg_demand *d, const dg_machine *m, const dg_plan *p, int32_t queue) {
    const int64_t ring = queue == DG_QUEUE_DISK ? p->ram_ring : queue == DG_QUEUE_PCIE ? p->vram_ring : 0;
    if (ring == 0) return 0.0;
    return smaller(serial_time(m, p->gpu, d->layer_ops, (double)d->layer_bytes) / d->n_layer,
                   seconds_of(m, queue, (double)ring));
}

static double top_time(const dg_demand *d, const dg_machine *m, bool gpu) {
    return serial_time(m, gpu, d->top_ops, (double)d->top_bytes);
}

/* The seconds that the first layers of a step gain: between two steps there is more time to fill the ring than between
 * two layers. */
static double first_start(const dg_demand *d, const dg_machine *m, const dg_plan *p) {
    return larger(0.0, smaller(top_time(d, m, p->gpu), seconds_of(m, DG_QUEUE_DISK, (double)p->ram_ring)) -
                           head_start(d, m, p, DG_QUEUE_DISK));
}

static const double WAITS = 5e-5; /* seconds in each layer until CPU and GPU are notified that the other is done */

/* The seconds of a layer's experts: those of the slowest queue. When the GPU works too, the CPU gets its inputs late,
 * and must return its results before the layer ends. */
static double layer_time(const dg_demand *d, const dg_machine *m, bool gpu, const double start[DG_QUEUES], int32_t l,
                         const int32_t count[DG_WAYS]) {
    double amount[DG_QUEUES], worst = 0.0;
    layer_amounts(d, gpu, l, count, amount);
    for (int32_t q = 0; q < DG_QUEUES; q++) {
        const double late = q == DG_QUEUE_CPU && hands_over(count, gpu)
                                ? WAITS + 2 * seconds_of(m, DG_QUEUE_PCIE, (double)d->pass_bytes)
                                : 0.0;
        worst = larger(worst, seconds_of(m, q, amount[q]) + late - start[q]);
    }
    return worst;
}

static int64_t fixed_bytes(const dg_demand *d) {
    return d->layer_bytes + d->top_bytes + d->cache_bytes + d->work_bytes;
}
static int64_t fixed_ram(const dg_demand *d, bool gpu) {
    return d->process_bytes + (gpu ? d->work_bytes : fixed_bytes(d) + d->canvas_bytes);
}
static int64_t fixed_vram(const dg_demand *d, bool gpu) { return gpu ? VRAM_PROCESS + fixed_bytes(d) : 0; }

int64_t placement_fixed_vram(const dg_demand *d) { return fixed_vram(d, true); }

void dg_plan_measure(const dg_demand *d, const dg_machine *m, dg_plan *p) {
    double start[DG_QUEUES], idle[DG_QUEUES], gain = 0.0;
    for (int32_t q = 0; q < DG_QUEUES; q++) {
        start[q] = idle[q] = head_start(d, m, p, q);
        p->amount[q] = 0.0;
    }
    idle[DG_QUEUE_DISK] = INFINITY;
    p->serial = serial_time(m, p->gpu, d->layer_ops, (double)d->layer_bytes) + top_time(d, m, p->gpu);
    p->seconds = p->serial;
    p->ram_experts = p->vram_experts = 0;
    for (int32_t l = 0; l < d->n_layer; l++) {
        int32_t count[DG_WAYS];
        double amount[DG_QUEUES];
        for (int32_t w = 0; w < DG_WAYS; w++) count[w] = p->blocks[w][l];
        layer_amounts(d, p->gpu, l, count, amount);
        for (int32_t q = 0; q < DG_QUEUES; q++) p->amount[q] += amount[q];
        const double seconds = layer_time(d, m, p->gpu, start, l, count);
        p->seconds += seconds;
        gain += seconds - layer_time(d, m, p->gpu, idle, l, count);
        p->vram_experts += count[DG_WAY_VRAM] * d->block_bytes[l];
        p->ram_experts += (count[DG_WAY_RAM_GPU] + count[DG_WAY_RAM_CPU]) * d->block_bytes[l];
    }
    p->seconds -= smaller(gain, first_start(d, m, p));
    p->amount[p->gpu ? DG_QUEUE_GPU : DG_QUEUE_CPU] += d->layer_ops + d->top_ops;
    p->amount[p->gpu ? DG_QUEUE_GPU_MEMORY : DG_QUEUE_HOST] += (double)(d->layer_bytes + d->top_bytes);
    for (int32_t q = 0; q < DG_QUEUES; q++) p->busy[q] = seconds_of(m, q, p->amount[q]);
    p->ram_process = d->process_bytes;
    p->vram_process = p->gpu ? VRAM_PROCESS : 0;
    p->ram_used = fixed_ram(d, p->gpu) + p->ram_ring + p->ram_experts;
    p->vram_used = fixed_vram(d, p->gpu) + p->vram_ring + p->vram_experts;
}

dg_way dg_plan_way(const dg_plan *p, int32_t l, int32_t expert) {
    int32_t way = 0;
    while (way < DG_WAYS - 1 && expert >= p->blocks[way][l]) expert -= p->blocks[way++][l];
    return (dg_way)way;
}

/* ---- Linear programs ---- */

/* A linear program: maximise c x with A x <= b and x >= 0, where b >= 0. It is solved by the simplex method, which
 * starts at x = 0. The tableau has a row for each constraint, then the objective; it has a column for each nonbasic
 * variable, then the right side. Variables below n_col are x, the others are slacks. */
typedef struct program {
    int32_t n_row, n_col;
    double *at;      /* [n_row + 1][n_col + 1] the tableau */
    int32_t *row_is; /* [n_row] the basic variable of a row: its value is on the right side */
    int32_t *col_is; /* [n_col] the nonbasic variable of a column: its value is 0 */
} program;

static double *cell(const program *p, int32_t row, int32_t col) {
    return &p->at[(size_t)row * (size_t)(p->n_col + 1) + (size_t)col];
}

static bool program_new(int32_t n_row, int32_t n_col, program *p) {
    *p = (program){
        .n_row = n_row,
        .n_col = n_col,
        .at = calloc((size_t)(n_row + 1) * (size_t)(n_col + 1), sizeof *p->at),
        .row_is = calloc((size_t)n_row, sizeof *p->row_is),
        .col_is = calloc((size_t)n_col, sizeof *p->col_is),
    };
    if (!p->at || !p->row_is || !p->col_is) return false;
    for (int32_t i = 0; i < n_row; i++) p->row_is[i] = n_col + i;
    for (int32_t i = 0; i < n_col; i++) p->col_is[i] = i;
    return true;
}

static void program_free(program *p) {
    free(p->at);
    free(p->row_is);
    free(p->col_is);
}

/* Exchanges the basic variable of a row with the nonbasic variable of a column. */
static void pivot(program *p, int32_t row, int32_t col) {
    const double by = *cell(p, row, col);
    for (int32_t c = 0; c <= p->n_col; c++) *cell(p, row, c) /= c == col ? 1.0 : by;
    *cell(p, row, col) = 1.0 / by;
    for (int32_t r = 0; r <= p->n_row; r++) {
        const double times = *cell(p, r, col);
        if (r == row || times == 0.0) continue;
        for (int32_t c = 0; c <= p->n_col; c++)
            if (c != col) *cell(p, r, c) -= times * *cell(p, row, c);
        *cell(p, r, col) = -times / by;
    }
    const int32_t was = p->row_is[row];
    p->row_is[row] = p->col_is[col];
    p->col_is[col] = was;
}

/* Solves the program. Bland's rule: of the variables that may enter or leave the basis, the one with the lowest number
 * does. With it the method always ends. */
static void program_solve(program *p) {
    const double zero = 1e-11;
    for (;;) {
        int32_t col = -1, row = -1;
        for (int32_t c = 0; c < p->n_col; c++)
            if (*cell(p, p->n_row, c) > zero && (col < 0 || p->col_is[c] < p->col_is[col])) col = c;
        if (col < 0) return;
        for (int32_t r = 0; r < p->n_row; r++) {
            const double by = *cell(p, r, col);
            if (by <= zero) continue;
            if (row < 0) {
                row = r;
                continue;
            }
            const double cross = *cell(p, r, p->n_col) * *cell(p, row, col) - *cell(p, row, p->n_col) * by;
            if (cross < 0 || (cross == 0 && p->row_is[r] < p->row_is[row])) row = r;
        }
        if (row < 0) return; /* does not happen: every variable is bounded */
        pivot(p, row, col);
    }
}

static double program_value(const program *p, int32_t unknown) {
    for (int32_t r = 0; r < p->n_row; r++)
        if (p->row_is[r] == unknown) return larger(*cell(p, r, p->n_col), 0.0);
    return 0.0;
}

/* ---- Shares ---- */

/* Layers with one block size, and the shares of a layer's experts. Experts that are neither in VRAM nor copied to the
 * GPU are computed by the CPU; experts that are in no memory are read from the disk. */
typedef struct class {
    int64_t block_bytes; /* bytes of one expert */
    int32_t layers;      /* the number of layers */
    double vram;         /* share of the experts that are kept in VRAM */
    double ram;          /* share of the experts that are kept in RAM */
    double copied;       /* share of the experts that are copied to the GPU at every step, from RAM or from disk */
} class;

/* The unknowns of a class in the linear program. */
enum {
    SHARE_VRAM,
    SHARE_RAM,
    SHARE_COPIED,
    SHARE_SAVED, /* time of a layer that is saved, against the time with all experts on disk and the CPU alone */
    UNKNOWNS
};
/* The constraints of a class. */
enum {
    ROW_DISK, /* the six queues: a layer takes at least the time of each */
    ROW_HOST,
    ROW_PCIE,
    ROW_GPU,
    ROW_GPU_MEMORY,
    ROW_CPU,
    ROW_PLACES,   /* vram + ram <= 1 */
    ROW_COMPUTED, /* vram + copied <= 1 */
    ROW_COPIED,   /* copied <= 1, or <= 0 without a ring in VRAM */
    ROW_SAVED,    /* saved <= the time with all experts on disk */
    ROWS
};
static const double IDLE = 1e6;   /* the CPU is this many times slower in plans that use it only where they must */
static const double WORTH = 0.97; /* CPU and GPU together must take less than this share of the time of one alone */
static const double SHORT = 1.1;  /* a plan with a ring below RING_GOOD is taken to be this many times slower */
static const double TIE = 1e-7;   /* the value of a share in memory that saves no time, so that memory is used */

typedef struct search {
    const dg_demand *d;
    const dg_machine *m;
    int32_t n_class;
    class classes[MOST_CLASSES];
    int32_t of[DG_MAX_LAYERS]; /* [n_layer] the class of each layer */
    bool gpu;                  /* whether the GPU is used */
    bool copies;               /* whether VRAM has a ring of buffers for copied blocks */
    double start[DG_QUEUES];   /* head_start() of each queue, in seconds */
    int64_t ram, vram;         /* bytes that are left for blocks that are kept */
} search;

/* Sets a constraint of the class whose unknowns begin at column `base`: the four coefficients, and the right side. */
static void set(const program *p, int32_t row, int32_t base, double vram, double ram, double copied, double saved,
                double most) {
    *cell(p, row, base + SHARE_VRAM) = vram;
    *cell(p, row, base + SHARE_RAM) = ram;
    *cell(p, row, base + SHARE_COPIED) = copied;
    *cell(p, row, base + SHARE_SAVED) = saved;
    *cell(p, row, p->n_col) = most;
}

/* Finds the best shares of each class; *seconds is the time of the experts of all layers. In the program, times are in
 * units of reading all experts of a layer from RAM. After the constraints of the classes there are two more, for the
 * bytes in VRAM and in RAM, and the objective. */
static bool find_shares(search *s, double *seconds) {
    const dg_demand *d = s->d;
    const dg_machine *m = s->m;
    double all = 0.0, unit = 0.0;
    for (int32_t k = 0; k < s->n_class; k++) {
        const double bytes = (double)s->classes[k].block_bytes * d->n_expert;
        all += bytes * s->classes[k].layers;
        unit = larger(unit, seconds_of(m, DG_QUEUE_HOST, bytes));
    }
    program p;
    const int32_t n_col = UNKNOWNS * s->n_class, vram_row = ROWS * s->n_class, ram_row = vram_row + 1,
                  objective = ram_row + 1;
    if (!program_new(objective, n_col, &p)) {
        program_free(&p);
        return false;
    }
    *cell(&p, vram_row, n_col) = (double)s->vram / all;
    *cell(&p, ram_row, n_col) = (double)s->ram / all;
    *seconds = 0.0;
    for (int32_t k = 0; k < s->n_class; k++) {
        const class *c = &s->classes[k];
        const int32_t x = UNKNOWNS * k, row = ROWS * k;
        const double bytes = (double)c->block_bytes * d->n_expert, work = d->block_ops * d->n_expert;
        double t[DG_QUEUES], start[DG_QUEUES];
        const double whole[DG_QUEUES] = {
            [DG_QUEUE_DISK] = bytes, [DG_QUEUE_HOST] = bytes, [DG_QUEUE_PCIE] = bytes,
            [DG_QUEUE_CPU] = work,   [DG_QUEUE_GPU] = work,   [DG_QUEUE_GPU_MEMORY] = bytes,
        };
        for (int32_t q = 0; q < DG_QUEUES; q++) {
            const bool used = s->gpu || (q != DG_QUEUE_PCIE && q != DG_QUEUE_GPU && q != DG_QUEUE_GPU_MEMORY);
            t[q] = used ? seconds_of(m, q, whole[q]) / unit : 0.0;
            start[q] = s->start[q] / unit;
        }
        /* `most` is the time of a layer with all experts on disk and the CPU alone; SHARE_SAVED is subtracted from it
         */
        const double disk = t[DG_QUEUE_DISK], host = t[DG_QUEUE_HOST], cpu = t[DG_QUEUE_CPU];
        const double most = larger(larger(disk - start[DG_QUEUE_DISK], 2 * host), cpu);
        *seconds += c->layers * most * unit;
        set(&p, row + ROW_DISK, x, -disk, -disk, 0, 1, most + start[DG_QUEUE_DISK] - disk);
        set(&p, row + ROW_HOST, x, -2 * host, -host, 0, 1, most - 2 * host);
        set(&p, row + ROW_PCIE, x, 0, 0, t[DG_QUEUE_PCIE], 1, most + start[DG_QUEUE_PCIE]);
        set(&p, row + ROW_GPU, x, t[DG_QUEUE_GPU], 0, t[DG_QUEUE_GPU], 1, most);
        set(&p, row + ROW_GPU_MEMORY, x, t[DG_QUEUE_GPU_MEMORY], 0, t[DG_QUEUE_GPU_MEMORY], 1, most);
        set(&p, row + ROW_CPU, x, -cpu, 0, -cpu, 1, most - cpu);
        set(&p, row + ROW_PLACES, x, 1, 1, 0, 0, 1);
        set(&p, row + ROW_COMPUTED, x, 1, 0, 1, 0, 1);
        set(&p, row + ROW_COPIED, x, 0, 0, 1, 0, s->copies ? 1 : 0);
        set(&p, row + ROW_SAVED, x, 0, 0, 0, 1, most);
        const double weight = bytes * c->layers / all;
        *cell(&p, vram_row, x + SHARE_VRAM) = weight;
        *cell(&p, ram_row, x + SHARE_RAM) = weight;
        *cell(&p, objective, x + SHARE_VRAM) = *cell(&p, objective, x + SHARE_RAM) = TIE * weight;
        *cell(&p, objective, x + SHARE_SAVED) = c->layers;
    }
    /* a right side may be below 0 by a rounding error */
    for (int32_t r = 0; r < p.n_row; r++) *cell(&p, r, n_col) = larger(*cell(&p, r, n_col), 0.0);
    program_solve(&p);
    for (int32_t k = 0; k < s->n_class; k++) {
        class *c = &s->classes[k];
        c->vram = program_value(&p, UNKNOWNS * k + SHARE_VRAM);
        c->ram = program_value(&p, UNKNOWNS * k + SHARE_RAM);
        c->copied = program_value(&p, UNKNOWNS * k + SHARE_COPIED);
        *seconds -= c->layers * unit * program_value(&p, UNKNOWNS * k + SHARE_SAVED);
    }
    program_free(&p);
    return true;
}

/* ---- Whole blocks ---- */

/* Computes the blocks of a layer by way, from the numbers of blocks that are in VRAM, in RAM, and copied to the GPU.
 * Copied blocks come from RAM, as far as there are enough, and the others from disk. */
static void ways_of(int32_t n, int32_t vram, int32_t ram, int32_t copied, int32_t count[DG_WAYS]) {
    const int32_t from_ram = copied < ram ? copied : ram;
    count[DG_WAY_VRAM] = vram;
    count[DG_WAY_RAM_GPU] = from_ram;
    count[DG_WAY_RAM_CPU] = ram - from_ram;
    count[DG_WAY_DISK_GPU] = copied - from_ram;
    count[DG_WAY_DISK_CPU] = n - vram - ram - (copied - from_ram);
}

/* The seconds of a layer; to break ties, a tiny part of the work of all queues is added. */
static double cost(const search *s, int32_t l, int32_t vram, int32_t ram, int32_t copied) {
    int32_t count[DG_WAYS];
    double amount[DG_QUEUES], trace = 0.0;
    ways_of(s->d->n_expert, vram, ram, copied, count);
    layer_amounts(s->d, s->gpu, l, count, amount);
    for (int32_t q = 0; q < DG_QUEUES; q++) trace += seconds_of(s->m, q, amount[q]);
    return layer_time(s->d, s->m, s->gpu, s->start, l, count) + 1e-9 * trace;
}

/* Returns the best number of blocks to copy to the GPU. The cost is convex in this number, except that it drops where
 * the CPU has nothing left to do; so a bisection is compared with that end. */
static int32_t best_copied(const search *s, int32_t l, int32_t vram, int32_t ram, double *seconds) {
    const int32_t all = s->copies ? s->d->n_expert - vram : 0;
    int32_t from = 0, to = all;
    while (from < to) {
        const int32_t middle = from + (to - from) / 2;
        if (cost(s, l, vram, ram, middle + 1) < cost(s, l, vram, ram, middle)) from = middle + 1;
        else to = middle;
    }
    *seconds = cost(s, l, vram, ram, from);
    const double without_cpu = cost(s, l, vram, ram, all);
    if (without_cpu >= *seconds) return from;
    *seconds = without_cpu;
    return all;
}

/* The whole blocks of a layer: in VRAM, in RAM, and copied to the GPU. */
typedef struct cut {
    int32_t vram, ram, copied;
    double seconds;
} cut;

/* Returns the size of part j when `whole` is divided into n parts that are as equal as possible. */
static int32_t part_of(int64_t whole, int32_t j, int32_t n) { return (int32_t)((j + 1) * whole / n - j * whole / n); }

/* Rounds the shares down to whole blocks. Then moves single blocks of layers into memory that is left, or between VRAM
 * and RAM, as long as a layer becomes faster. False where there is no memory. */
static bool cut_shares(search *s, dg_plan *p) {
    static const struct {
        int32_t vram, ram;
    } moves[] = {
        {.vram = 1, .ram = 0},  {.vram = 1, .ram = -1}, {.vram = 0, .ram = 1},
        {.vram = -1, .ram = 1}, {.vram = -1, .ram = 0},
    };
    const dg_demand *d = s->d;
    cut *cuts = calloc((size_t)d->n_layer, sizeof *cuts);
    int32_t seen[MOST_CLASSES] = {0};
    bool moved = cuts != NULL;
    int64_t ram = s->ram, vram = s->vram;
    for (int32_t l = 0; cuts && l < d->n_layer; l++) {
        const class *c = &s->classes[s->of[l]];
        const int32_t j = seen[s->of[l]]++;
        const double blocks = (double)c->layers * d->n_expert;
        cuts[l].vram = part_of((int64_t)(c->vram * blocks + 0.01), j, c->layers);
        cuts[l].ram = part_of((int64_t)(c->ram * blocks + 0.01), j, c->layers);
        if (cuts[l].vram > d->n_expert) cuts[l].vram = d->n_expert;
        while (cuts[l].vram > 0 && cuts[l].vram * d->block_bytes[l] > vram) cuts[l].vram--;
        if (cuts[l].ram > d->n_expert - cuts[l].vram) cuts[l].ram = d->n_expert - cuts[l].vram;
        while (cuts[l].ram > 0 && cuts[l].ram * d->block_bytes[l] > ram) cuts[l].ram--;
        vram -= cuts[l].vram * d->block_bytes[l];
        ram -= cuts[l].ram * d->block_bytes[l];
        cuts[l].copied = best_copied(s, l, cuts[l].vram, cuts[l].ram, &cuts[l].seconds);
    }
    while (moved) {
        moved = false;
        for (int32_t l = 0; l < d->n_layer; l++)
            for (size_t i = 0; i < sizeof moves / sizeof *moves; i++) {
                cut c = {.vram = cuts[l].vram + moves[i].vram,
                         .ram = cuts[l].ram + moves[i].ram,
                         .copied = 0,
                         .seconds = 0.0};
                if (c.vram < 0 || c.ram < 0 || c.vram + c.ram > d->n_expert) continue;
                const int64_t more_vram = moves[i].vram * d->block_bytes[l],
                              more_ram = moves[i].ram * d->block_bytes[l];
                if (more_vram > vram || more_ram > ram) continue;
                c.copied = best_copied(s, l, c.vram, c.ram, &c.seconds);
                if (c.seconds >= cuts[l].seconds * (1 - 1e-12)) continue;
                cuts[l] = c;
                vram -= more_vram;
                ram -= more_ram;
                moved = true;
            }
    }
    for (int32_t l = 0; cuts && l < d->n_layer; l++) {
        int32_t count[DG_WAYS];
        ways_of(d->n_expert, cuts[l].vram, cuts[l].ram, cuts[l].copied, count);
        for (int32_t w = 0; w < DG_WAYS; w++) p->blocks[w][l] = count[w];
    }
    const bool done = cuts != NULL;
    free(cuts);
    return done;
}

/* ---- The search ---- */

/* Finds the classes of all layers. When there are MOST_CLASSES, a layer with another block size joins the class with
 * the nearest size. The class then has the smaller size, so that the time of the linear program remains a lower bound.
 */
static void find_classes(search *s) {
    const dg_demand *d = s->d;
    s->n_class = 0;
    for (int32_t l = 0; l < d->n_layer; l++) {
        const int64_t bytes = d->block_bytes[l];
        int32_t nearest = 0;
        for (int32_t k = 1; k < s->n_class; k++)
            if (llabs(s->classes[k].block_bytes - bytes) < llabs(s->classes[nearest].block_bytes - bytes)) nearest = k;
        if (s->n_class == 0 || (s->classes[nearest].block_bytes != bytes && s->n_class < MOST_CLASSES)) {
            nearest = s->n_class++;
            s->classes[nearest] = (class){.block_bytes = bytes};
        }
        class *c = &s->classes[nearest];
        c->block_bytes = smaller_of(c->block_bytes, bytes);
        c->layers++;
        s->of[l] = nearest;
    }
}

static int64_t ring_bytes(int64_t block, int64_t all, int32_t depth) {
    if (depth == 0) return 0;
    return smaller_of(block * RING_LEAST << (depth - 1), all);
}

static bool uses(const dg_plan *p, const dg_demand *d, dg_way a, dg_way b) {
    for (int32_t l = 0; l < d->n_layer; l++)
        if (p->blocks[a][l] || p->blocks[b][l]) return true;
    return false;
}

/* Computes the bytes of the largest block, and of all blocks. */
static void block_sizes(const dg_demand *d, int64_t *block, int64_t *all) {
    *block = *all = 0;
    for (int32_t l = 0; l < d->n_layer; l++) {
        if (*block < d->block_bytes[l]) *block = d->block_bytes[l];
        *all += d->block_bytes[l] * d->n_expert;
    }
}

int64_t placement_least_ram(const dg_demand *d, int64_t vram) {
    int64_t block, all;
    block_sizes(d, &block, &all);
    const int64_t ring = ring_bytes(block, all, 1), cpu = fixed_ram(d, false) + ring, left = vram - fixed_vram(d, true);
    if (left < 0) return cpu;
    return smaller_of(cpu, fixed_ram(d, true) + (left < all ? ring : 0));
}

double placement_told(int64_t bytes) { return ceil((double)bytes / GIB * 100) / 100; }

/* The processors that compute experts: the CPU alone; the GPU, and the CPU only where it must; or both. */
enum { USE_CPU, USE_GPU, USE_BOTH };

/* Tries each depth of both rings, with and without the GPU; *plan is the fastest plan that fits. */
static bool search_plans(search *s, const dg_machine *m, int64_t ram, int64_t vram, dg_plan *plan) {
    const dg_demand *d = s->d;
    dg_machine idle_cpu = *m;
    idle_cpu.cpu_ops /= IDLE;
    int64_t block, all;
    double least = INFINITY;
    double best = INFINITY; /* seconds of *plan, times SHORT where its ring is small */
    bool alone = false;     /* whether one processor alone computes experts in *plan */
    block_sizes(d, &block, &all);
    const int64_t enough = smaller_of(RING_GOOD, all / RING_SHARE);
    plan->seconds = INFINITY;
    for (int32_t use = USE_CPU; use <= USE_BOTH; use++)
        for (int32_t deep_ram = 0; deep_ram <= RING_DEPTHS; deep_ram++)
            for (int32_t deep_vram = 0; deep_vram <= (use == USE_CPU ? 0 : RING_DEPTHS); deep_vram++) {
                dg_plan p = {.gpu = use != USE_CPU, .ram = ram, .vram = vram};
                p.ram_ring = ring_bytes(block, all, deep_ram);
                p.vram_ring = ring_bytes(block, all, deep_vram);
                s->gpu = p.gpu;
                s->copies = deep_vram > 0;
                s->m = use == USE_GPU ? &idle_cpu : m;
                s->ram = ram - fixed_ram(d, p.gpu) - p.ram_ring;
                s->vram = p.gpu ? vram - fixed_vram(d, true) - p.vram_ring : 0;
                if (s->ram < 0 || s->vram < 0 || (deep_ram == 0 && s->ram + s->vram < all)) continue;
                for (int32_t q = 0; q < DG_QUEUES; q++) s->start[q] = head_start(d, m, &p, q);
                double bound;
                if (!find_shares(s, &bound) || !cut_shares(s, &p)) return false;
                dg_plan_measure(d, m, &p);
                if (use != USE_GPU) least = smaller(least, bound + p.serial - first_start(d, m, &p));
                const bool reads = uses(&p, d, DG_WAY_DISK_GPU, DG_WAY_DISK_CPU);
                if (deep_ram == 0 && reads) continue;
                const double seconds = p.seconds * (reads && p.ram_ring < enough ? SHORT : 1.0);
                if (!(seconds < best * (use == USE_BOTH && alone ? WORTH : 1 - 1e-9))) continue;
                *plan = p;
                best = seconds;
                alone = use != USE_BOTH;
            }
    plan->least = smaller(least, plan->seconds);
    return true;
}

/* ---- Budgets ---- */

int64_t dg_plan_margin(double bytes, bool vram) {
    return (int64_t)smaller(bytes, vram ? bytes / 16 + GIB / 4 : bytes / 8 + GIB);
}

static int check_machine(const dg_machine *m, dg_error *error) {
    for (size_t i = 0; i < sizeof rates / sizeof *rates; i++) {
        double v;
        memcpy(&v, (const char *)m + rate_offsets[i], sizeof v);
        const bool needed = !rates[i].optional || (m->vram > 0);
        if (!isfinite(v) || v < 0 || v > 1e18 || (needed && v == 0))
            return fail(error, DG_ERROR_USAGE, "machine '%s': %s (%s) must be a number %s, not %g %s",
                        m->name ? m->name : "", rates[i].field, rates[i].help, needed ? "above 0" : "of at least 0",
                        v / rates[i].scale, rates[i].unit);
    }
    return DG_OK;
}

/* Sets *out to the budget that is given, or without one (below 0) to the machine's memory less a margin. */
static int budget_bytes(const char *what, const dg_machine *m, double has, bool vram, int64_t given, int64_t *out,
                        dg_error *error) {
    *out = given >= 0 ? given : (int64_t)has - dg_plan_margin(has, vram);
    if (given > 0 && (double)given > has)
        return fail(error, DG_ERROR_MEMORY, "a %s budget of %.2f GiB cannot be kept: the machine '%s' has %.2f GiB",
                    what, (double)given / GIB, m->name ? m->name : "", has / GIB);
    return DG_OK;
}

int dg_plan_make(const dg_demand *d, const dg_machine *m, int64_t ram, int64_t vram, dg_plan *plan, dg_error *error) {
    *plan = (dg_plan){0};
    int status = check_machine(m, error);
    const bool any = ram < 0;
    if (status == DG_OK) status = budget_bytes("RAM", m, m->ram, false, ram, &ram, error);
    if (status == DG_OK) status = budget_bytes("VRAM", m, m->vram, true, vram, &vram, error);
    if (status != DG_OK) return status;
    const int64_t needed = placement_least_ram(d, vram);
    if (any && ram < needed && (double)needed <= m->ram) ram = needed;
    search s = {.d = d};
    find_classes(&s);
    if (!search_plans(&s, m, ram, vram, plan)) return fail(error, DG_ERROR_SYSTEM, "no memory for a plan");
    if (plan->seconds == INFINITY)
        return fail(error, DG_ERROR_MEMORY,
                    "a RAM budget of %.2f GiB cannot be kept: it takes at least %.2f GiB, for a context of %d tokens",
                    (double)ram / GIB, placement_told(needed), d->context);
    plan->gpu_least = fixed_vram(d, true);
    return DG_OK;
}
