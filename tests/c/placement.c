/* The planner: its model of time against figures worked out by hand, its plans against every other plan. */
#include "memory/placement.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "material.h"

#define GIB (1ll << 30)

static double between(double least, double most) { return least * exp(uniform() * log(most / least)); }

static dg_demand some_demand(int32_t n_layer, int32_t n_expert, int64_t block) {
    dg_demand d = {.n_layer = n_layer, .n_expert = n_expert, .context = 100};
    for (int32_t l = 0; l < n_layer; l++) d.block_bytes[l] = l % 3 ? block : block + block / 3;
    d.layer_bytes = 3 * block;
    d.top_bytes = 2 * block;
    d.cache_bytes = d.work_bytes = block;
    d.pass_bytes = block / 2;
    d.block_ops = 50.0 * (double)block;
    d.layer_ops = 100.0 * (double)block;
    d.top_ops = 80.0 * (double)block;
    return d;
}

static dg_machine some_machine(bool gpu) {
    dg_machine m = {.name = "test",
                    .ram = 1e13,
                    .disk = between(1e9, 1e10),
                    .host = between(1e10, 1e11),
                    .cpu_ops = between(1e11, 1e13)};
    if (gpu) m.vram = 1e13, m.pcie = between(3e9, 5e10), m.gpu = between(1e11, 2e12), m.gpu_ops = between(1e12, 1e14);
    return m;
}

static int64_t experts_of(const dg_demand *d) {
    int64_t all = 0;
    for (int32_t l = 0; l < d->n_layer; l++) all += d->block_bytes[l] * d->n_expert;
    return all;
}

/* A plan is sound: whole, within its budgets, and what it says of itself is what its blocks give. */
static void check_plan(const dg_demand *d, const dg_machine *m, const dg_plan *p) {
    bool disk = false, copied = false;
    for (int32_t l = 0; l < d->n_layer; l++) {
        int32_t sum = 0;
        for (int32_t w = 0; w < DG_WAYS; w++) {
            CHECK(p->blocks[w][l] >= 0, "layer %d", l);
            sum += p->blocks[w][l];
        }
        CHECK(sum == d->n_expert, "layer %d has %d experts", l, sum);
        disk |= p->blocks[DG_WAY_DISK_CPU][l] + p->blocks[DG_WAY_DISK_GPU][l] > 0;
        copied |= p->blocks[DG_WAY_RAM_GPU][l] + p->blocks[DG_WAY_DISK_GPU][l] > 0;
    }
    CHECK(p->ram_used <= p->ram && p->vram_used <= p->vram, "RAM %lld of %lld, VRAM %lld of %lld",
          (long long)p->ram_used, (long long)p->ram, (long long)p->vram_used, (long long)p->vram);
    CHECK((!disk || p->ram_ring > 0) && (!copied || p->vram_ring > 0), "streams have rings");
    CHECK(p->gpu || p->vram_used == 0, "VRAM without a GPU");
    dg_plan again = *p;
    dg_plan_measure(d, m, &again);
    CHECK(again.seconds == p->seconds && again.ram_used == p->ram_used && again.vram_used == p->vram_used,
          "measured again");
    CHECK(p->least <= p->seconds * (1 + 1e-12) && p->serial <= p->seconds, "%g %g %g", p->least, p->serial, p->seconds);
    int32_t counted[DG_WAYS] = {0};
    for (int32_t e = 0; e < d->n_expert; e++) counted[dg_plan_way(p, 0, e)]++;
    for (int32_t w = 0; w < DG_WAYS; w++) CHECK(counted[w] == p->blocks[w][0], "way %d of layer 0", w);
}

/* ---- Strategies worked out by hand: 13 GB of experts, PCIe of 12 GB/s, 28 % in VRAM ---- */

static void set_all(dg_plan *p, const dg_demand *d, double vram, double copied) {
    for (int32_t l = 0; l < d->n_layer; l++) {
        const int32_t on_gpu = (int32_t)lround(vram * d->n_expert),
                      streamed = (int32_t)lround(copied * (d->n_expert - on_gpu));
        p->blocks[DG_WAY_VRAM][l] = on_gpu;
        p->blocks[DG_WAY_RAM_GPU][l] = streamed;
        p->blocks[DG_WAY_RAM_CPU][l] = d->n_expert - on_gpu - streamed;
    }
}

static void test_strategies(void) {
    dg_demand d = {.n_layer = 30, .n_expert = 1000, .block_ops = 731e9 / 30000};
    for (int32_t l = 0; l < d.n_layer; l++) d.block_bytes[l] = (int64_t)(13e9 / 30000);
    const struct {
        double cpu, alone, both, share;
    } cores[] = {{620e9, 0.85, 0.41, 0.52}, {1250e9, 0.42, 0.27, 0.35}};
    for (size_t i = 0; i < sizeof cores / sizeof *cores; i++) {
        const dg_machine m = {.name = "8 GB",
                              .ram = 64e9,
                              .vram = 8e9,
                              .disk = 4e9,
                              .host = 60e9,
                              .pcie = 12e9,
                              .gpu = 250e9,
                              .cpu_ops = cores[i].cpu,
                              .gpu_ops = 40e12};
        dg_plan p = {.gpu = true, .vram_ring = 1 << 20};
        const struct {
            const char *what;
            double vram, copied, seconds;
        } rows[] = {
            {"stream everything", 0, 1, 1.08},
            {"pinned + stream", 0.28, 1, 0.78},
            {"pinned + CPU", 0.28, 0, cores[i].alone},
            {"pinned + stream + CPU", 0.28, cores[i].share, cores[i].both},
        };
        for (size_t k = 0; k < sizeof rows / sizeof *rows; k++) {
            set_all(&p, &d, rows[k].vram, rows[k].copied);
            dg_plan_measure(&d, &m, &p);
            CHECK(fabs(p.seconds - rows[k].seconds) < 0.006, "%s: %.3f s, expected %.2f", rows[k].what, p.seconds,
                  rows[k].seconds);
        }
        dg_error error;
        const int64_t process = 384ll << 20, ring = 4 * d.block_bytes[0];
        CHECK(dg_plan_make(&d, &m, -1, process + ring + (int64_t)(0.28 * 13e9), &p, &error) == DG_OK, "%s",
              error.message);
        CHECK(fabs(p.seconds - cores[i].both) < 0.006, "the planner's own: %.3f s, expected %.2f", p.seconds,
              cores[i].both);
        check_plan(&d, &m, &p);
    }
}

/* ---- Every other plan ---- */

static int64_t depth_of(const dg_plan *p, bool vram) { return vram ? p->vram_ring : p->ram_ring; }

/* The fastest of all plans with these rings and processors: every way of every block. */
static double brute_force(const dg_demand *d, const dg_machine *m, const dg_plan *like) {
    const int32_t n = d->n_expert, layers = d->n_layer;
    dg_plan p = *like;
    double best = INFINITY;
    int64_t combinations = 1, per_layer = 0;
    int32_t splits[1024][DG_WAYS];
    for (int32_t a = 0; a <= n; a++)
        for (int32_t b = 0; a + b <= n; b++)
            for (int32_t c = 0; a + b + c <= n; c++)
                for (int32_t e = 0; a + b + c + e <= n; e++) {
                    if (!p.gpu && a + b + e > 0) continue;
                    if (depth_of(&p, true) == 0 && b + e > 0) continue;
                    if (depth_of(&p, false) == 0 && a + b + c < n) continue;
                    const int32_t one[DG_WAYS] = {a, b, c, e, n - a - b - c - e};
                    memcpy(splits[per_layer++], one, sizeof one);
                }
    for (int32_t l = 0; l < layers; l++) combinations *= per_layer;
    for (int64_t i = 0; i < combinations; i++) {
        int64_t left = i;
        for (int32_t l = 0; l < layers; l++, left /= per_layer)
            for (int32_t w = 0; w < DG_WAYS; w++) p.blocks[w][l] = splits[left % per_layer][w];
        dg_plan_measure(d, m, &p);
        if (p.ram_used <= p.ram && p.vram_used <= p.vram && p.seconds < best) best = p.seconds;
    }
    return best;
}

static void test_small_cases(void) {
    int32_t equal = 0, cases = 0;
    for (int32_t i = 0; i < 80; i++) {
        const bool gpu = i % 4 != 0;
        const int64_t block = 100ll << 20;
        const dg_demand d = some_demand(2, 2 + i % 2, block);
        const dg_machine m = some_machine(gpu);
        const int64_t all = experts_of(&d), ram = (1ll << 30) + (int64_t)(uniform() * 2 * (double)all),
                      vram = (int64_t)(uniform() * 3 * (double)all);
        dg_plan p;
        dg_error error;
        const int status = dg_plan_make(&d, &m, ram, gpu ? vram : 0, &p, &error);
        CHECK(status == DG_OK || status == DG_ERROR_MEMORY, "%s", error.message);
        if (status != DG_OK) continue;
        check_plan(&d, &m, &p);
        const double best = brute_force(&d, &m, &p);
        /* never faster than the fastest, and with so few blocks never far from it */
        CHECK(p.seconds >= best * (1 - 1e-9) && p.least <= best * (1 + 1e-6), "case %d: %g, best %g, bound %g", i,
              p.seconds, best, p.least);
        CHECK(p.seconds <= best * 1.25, "case %d: %g, best %g", i, p.seconds, best);
        cases++;
        equal += p.seconds <= best * (1 + 1e-9);
    }
    CHECK(cases >= 60 && equal * 10 >= cases * 9, "%d of %d plans are the best", equal, cases);
}

/* ---- More of anything is never worse ---- */

static void test_monotone(void) {
    for (int32_t i = 0; i < 24; i++) {
        dg_demand d = some_demand(6, 32, 20 << 20);
        d.pass_bytes = 0; /* the bound knows nothing of it */
        const bool gpu = i % 3 != 0;
        dg_machine m = some_machine(gpu);
        const int64_t all = experts_of(&d);
        const int64_t ram = GIB + (int64_t)(uniform() * 1.2 * (double)all),
                      vram = gpu ? GIB + (int64_t)(uniform() * 1.2 * (double)all) : 0;
        dg_plan p, q;
        dg_error error;
        CHECK(dg_plan_make(&d, &m, ram, vram, &p, &error) == DG_OK, "%s", error.message);
        check_plan(&d, &m, &p);
        CHECK(p.seconds <= p.least * 1.15, "case %d: whole blocks take %g, shares %g", i, p.seconds, p.least);
        double *const rates[] = {&m.disk, &m.host, &m.pcie, &m.gpu, &m.cpu_ops, &m.gpu_ops};
        for (size_t k = 0; k < sizeof rates / sizeof *rates + 2; k++) {
            dg_machine better = m;
            const bool is_ram = k == 6, is_vram = k == 7;
            if (k < 6) *(double *)(void *)((char *)&better + ((char *)rates[k] - (char *)&m)) *= 1.3;
            if (is_vram && !gpu) continue;
            CHECK(dg_plan_make(&d, &better, ram + (is_ram ? all / 10 : 0), vram + (is_vram ? all / 10 : 0), &q,
                               &error) == DG_OK,
                  "%s", error.message);
            check_plan(&d, &better, &q);
            CHECK(q.least <= p.least * (1 + 1e-6), "case %d, %zu: the bound rose from %g to %g", i, k, p.least,
                  q.least);
            CHECK(q.seconds <= p.seconds * 1.05, "case %d, %zu: from %g to %g", i, k, p.seconds, q.seconds);
        }
    }
}

/* ---- The ends ---- */

static void test_refusals(void) {
    const dg_demand d = some_demand(4, 16, 50 << 20);
    dg_machine m = some_machine(true);
    dg_plan p;
    dg_error error;
    CHECK(dg_plan_make(&d, &m, 1000, 0, &p, &error) == DG_ERROR_MEMORY && strstr(error.message, "at least") &&
              strstr(error.message, "RAM"),
          "%s", error.message);
    /* the least that it names will do, and a little less will not */
    const double least = strtod(strstr(error.message, "at least ") + 9, NULL);
    CHECK(dg_plan_make(&d, &m, (int64_t)(least * (double)GIB), 0, &p, &error) == DG_OK, "%s", error.message);
    check_plan(&d, &m, &p);
    CHECK(dg_plan_make(&d, &m, (int64_t)((least - 0.02) * (double)GIB), 0, &p, &error) == DG_ERROR_MEMORY,
          "%g GiB were enough", least - 0.02);
    /* where nothing is asked for, the margin gives way to it */
    m = some_machine(false);
    m.ram = least * (double)GIB;
    CHECK(dg_plan_make(&d, &m, -1, -1, &p, &error) == DG_OK && (double)p.ram <= least * (double)GIB, "%s",
          error.message);
    check_plan(&d, &m, &p);
    m.ram = (least - 0.02) * (double)GIB;
    CHECK(dg_plan_make(&d, &m, -1, -1, &p, &error) == DG_ERROR_MEMORY, "%g GiB were enough", least - 0.02);
    m = some_machine(true);
    m.ram = (double)(2 * GIB);
    CHECK(dg_plan_make(&d, &m, 3 * GIB, 0, &p, &error) == DG_ERROR_MEMORY && strstr(error.message, "has 2.00 GiB"),
          "%s", error.message);
    m = some_machine(true);
    for (int32_t i = 0; dg_rate_at(i); i++) {
        dg_machine broken = m;
        double *const fields[] = {&broken.ram,  &broken.vram, &broken.disk,    &broken.host,
                                  &broken.pcie, &broken.gpu,  &broken.cpu_ops, &broken.gpu_ops};
        const double values[] = {-1.0, NAN, INFINITY, 0.0};
        for (size_t k = 0; k < 4; k++) {
            *fields[i] = values[k];
            if (k == 3 && i == 1) continue; /* no VRAM is no GPU */
            CHECK(dg_plan_make(&d, &broken, -1, -1, &p, &error) == DG_ERROR_USAGE &&
                      strstr(error.message, dg_rate_at(i)->field),
                  "%s: %s", dg_rate_at(i)->field, error.message);
        }
    }
    m.vram = m.pcie = m.gpu = m.gpu_ops = 0;
    CHECK(dg_plan_make(&d, &m, -1, -1, &p, &error) == DG_OK && !p.gpu, "without a GPU");
    check_plan(&d, &m, &p);
    CHECK(dg_plan_make(&d, &m, -1, GIB, &p, &error) == DG_ERROR_MEMORY, "VRAM of no GPU");
}

static void test_degenerate(void) {
    dg_plan p;
    dg_error error;
    const dg_demand one = some_demand(1, 1, 1 << 20);
    dg_machine m = some_machine(true);
    CHECK(dg_plan_make(&one, &m, -1, -1, &p, &error) == DG_OK, "%s", error.message);
    check_plan(&one, &m, &p);
    dg_demand many = some_demand(DG_MAX_LAYERS, 128, 4 << 20);
    CHECK(dg_plan_make(&many, &m, 60 * GIB, 30 * GIB, &p, &error) == DG_OK, "%s", error.message);
    check_plan(&many, &m, &p);
    for (int32_t l = 0; l < many.n_layer; l++)
        many.block_bytes[l] = (4 << 20) + (l << 14); /* as many sizes as layers */
    CHECK(dg_plan_make(&many, &m, 60 * GIB, 30 * GIB, &p, &error) == DG_OK, "%s", error.message);
    check_plan(&many, &m, &p);
    /* all fits: nothing moves */
    m = *dg_machine_at(4);
    m.cpu_ops /= 5;
    const dg_demand d = some_demand(6, 128, 4 << 20);
    CHECK(dg_plan_make(&d, &m, -1, -1, &p, &error) == DG_OK && p.gpu && p.vram_experts == experts_of(&d) &&
              p.amount[DG_QUEUE_PCIE] == 0,
          "gpu %d, %lld of %lld, %g s", p.gpu, (long long)p.vram_experts, (long long)experts_of(&d), p.seconds);
    /* a GPU that is no use is not used; one that is too small neither, and the plan says what it would take */
    m.gpu_ops = 1e9, m.gpu = 1e8;
    CHECK(dg_plan_make(&d, &m, -1, -1, &p, &error) == DG_OK && !p.gpu && p.vram_used == 0, "a GPU slower than the CPU");
    m = *dg_machine_at(4);
    CHECK(dg_plan_make(&d, &m, -1, 1 << 20, &p, &error) == DG_OK && !p.gpu && p.gpu_least > 1 << 20, "a GPU of 1 MiB");
    check_plan(&d, &m, &p);
    /* bound by the disk: a ring lets it read on through the serial part */
    m = *dg_machine_at(0);
    m.disk = 1e8;
    CHECK(dg_plan_make(&d, &m, GIB, -1, &p, &error) == DG_OK && p.ram_ring > 0, "%s", error.message);
    CHECK(p.busy[DG_QUEUE_DISK] > 0.9 * p.seconds && p.seconds < p.busy[DG_QUEUE_DISK] + p.serial, "%g of %g",
          p.busy[DG_QUEUE_DISK], p.seconds);
    check_plan(&d, &m, &p);
}

static void test_lists(void) {
    int32_t n = 0;
    for (const dg_machine *m; (m = dg_machine_at(n)) != NULL; n++)
        CHECK(m->name && m->about && *m->source && m->ram > 0, "machine %d", n);
    CHECK(n >= 5 && !dg_machine_at(-1) && dg_way_at(DG_WAYS - 1) && !dg_way_at(DG_WAYS) && dg_queue_at(DG_QUEUES - 1) &&
              !dg_queue_at(DG_QUEUES),
          "lists end");
    CHECK(dg_plan_margin(16.0 * (double)GIB, false) == 3 * GIB && dg_plan_margin(100, false) == 100, "margins");
}

/* The caller tells how much memory the process takes: it counts like anything else. A canvas counts if the CPU keeps
 * it. */
static void test_process(void) {
    dg_demand d = some_demand(3, 8, 10 << 20);
    const int64_t without = placement_least_ram(&d, 0);
    d.process_bytes = 100 << 20;
    CHECK(placement_least_ram(&d, 0) - without == 100 << 20, "%lld", (long long)without);
    const int64_t told = placement_least_ram(&d, 0);
    d.canvas_bytes = 7 << 20;
    CHECK(placement_least_ram(&d, 0) == told + (7 << 20), "%lld", (long long)told);
    const dg_machine m = some_machine(false);
    dg_plan p;
    dg_error error;
    CHECK(dg_plan_make(&d, &m, told + (7 << 20), 0, &p, &error) == DG_OK, "%s", error.message);
    CHECK(p.ram_process == 100 << 20 && p.ram_used <= told + (7 << 20), "%lld", (long long)p.ram_used);
}

/* The disk reads on while the output head is computed, as far as the ring holds it. */
static void test_between_steps(void) {
    dg_demand d = {.n_layer = 10, .n_expert = 100, .block_ops = 1e6, .layer_ops = 1e9, .top_ops = 1e12};
    for (int32_t l = 0; l < d.n_layer; l++) d.block_bytes[l] = 10000000;
    const dg_machine m = {.name = "slow disk", .ram = 1e12, .disk = 1e9, .host = 1e11, .cpu_ops = 1e12};
    dg_plan p = {.ram_ring = 400000000};
    for (int32_t l = 0; l < d.n_layer; l++) p.blocks[DG_WAY_DISK_CPU][l] = 100;
    dg_plan_measure(&d, &m, &p);
    /* 10 s of reading; 1 s of head and 1 ms of layers, in which 0.4 s of that are done */
    CHECK(fabs(p.seconds - (10 + 1 - 0.4)) < 0.01, "%g s", p.seconds);
}

int main(void) {
    test_lists();
    test_strategies();
    test_small_cases();
    test_monotone();
    test_refusals();
    test_degenerate();
    test_process();
    test_between_steps();
    return check_done("placement");
}
