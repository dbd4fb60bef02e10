#include "ram.h"

#include <math.h>

#include "demand.h"
#include "error.h"
#include "os.h"
#include "placement.h"
#include "scratch.h"

#define GIB 1073741824.0

static double down(int64_t bytes) { return floor((double)bytes / GIB * 100) / 100; }

/* Returns the bytes of a plain map: all weights of the layers that run, and a session. */
static int64_t mapped_bytes(const dg_model *m) {
    int64_t bytes = scratch_session_bytes(m, demand_context(m));
    for (uint64_t i = 0; i < m->file->n_tensors; i++)
        if (demand_layer(&m->file->tensors[i]) < m->config.n_layer) bytes += (int64_t)m->file->tensors[i].bytes;
    return bytes;
}

/* The budget of a file that is larger than memory: what is free, less a margin for others, but at least what it takes;
 * where there is less than that, no budget helps. */
static int64_t choose(const dg_ram *r, int64_t held) {
    const int64_t most = held + r->free, good = most - dg_plan_margin((double)r->free, false);
    if (r->needs <= r->free || r->free == 0 || r->least > most) return 0;
    return good > r->least ? good : r->least;
}

int ram_decide(const dg_model *m, int64_t asked, dg_ram *out, dg_error *error) {
    const int64_t left = dg_memory_free(), held = os_resident(), most = left + held;
    dg_demand d;
    demand_session(m, demand_context(m), true, &d);
    d.process_bytes = demand_process(m, held);
    *out = (dg_ram){.needs = mapped_bytes(m), .free = left, .least = placement_least_ram(&d, 0) + DEMAND_VARIES};
    if (asked == DG_RAM_AUTO) {
        out->budget = choose(out, held);
        return DG_OK;
    }
    out->budget = asked;
    if (asked <= most || left == 0) return DG_OK;
    return fail(error, DG_ERROR_MEMORY,
                "ram: %.2f GiB is more than the %.2f GiB of memory that are free; at most %.2f GiB, or auto",
                (double)asked / GIB, (double)most / GIB, down(most - DEMAND_VARIES));
}
