#include "sampler.h"

#include <math.h>
#include <stdlib.h>

#include "error.h"
#include "random.h"

int dg_accept(const float *entropy, int32_t n, float bound, bool *accepted, dg_error *error) {
    int32_t *order = malloc(sizeof *order * (size_t)(n > 0 ? n : 1));
    if (!order) return fail(error, DG_ERROR_SYSTEM, "no memory for a canvas of %d tokens", n);
    for (int32_t i = 0; i < n; i++) order[sampler_place(entropy, n, i)] = i;
    accept_entropy_bound(&(dg_sampling){.entropy_bound = bound}, entropy, order, n, accepted);
    free(order);
    return DG_OK;
}

/* A low is clear when it is below the last one by a tenth. */
bool sampler_plateau(const dg_sampling *s, int32_t index, float mean_entropy, sampler_low *low) {
    if (index == 0 || mean_entropy < 0.9f * low->mean) *low = (sampler_low){mean_entropy, 0};
    else low->steps++;
    return s->plateau > 0 && low->steps >= s->plateau;
}

void dg_draw(uint64_t seed, int32_t block, int32_t step, int32_t n, int32_t n_vocab, double *u, int32_t *ids) {
    for (int32_t i = 0; i < n; i++)
        random_draw(seed, (uint32_t)block, (uint32_t)step, (uint32_t)i, (uint32_t)n_vocab, &u[i], &ids[i]);
}

void dg_choose(const float *z, int64_t n, int64_t n_vocab, const double *u, dg_choice *out) {
    for (int64_t i = 0; i < n; i++) {
        const float *row = z + i * n_vocab;
        int64_t best = 0;
        bool finite = isfinite(row[0]);
        for (int64_t v = 1; v < n_vocab; v++) {
            if (row[v] > row[best]) best = v;
            finite = finite && isfinite(row[v]);
        }
        if (!finite) {
            out[i] = (dg_choice){NAN, -1, -1};
            continue;
        }
        double total = 0.0, weighted = 0.0; /* H = log Z - sum d e^d / Z, d = z - max */
        for (int64_t v = 0; v < n_vocab; v++) {
            const double d = (double)row[v] - (double)row[best], p = exp(d);
            total += p;
            if (p > 0.0) weighted += d * p;
        }
        const double aim = u[i] * total;
        double below = 0.0;
        int64_t sample = -1;
        for (int64_t v = 0; v < n_vocab && sample < 0; v++) {
            below += exp((double)row[v] - (double)row[best]);
            if (below > aim) sample = v;
        }
        const double entropy = log(total) - weighted / total;
        out[i] =
            (dg_choice){entropy > 0.0 ? (float)entropy : 0.0f, (int32_t)best, (int32_t)(sample < 0 ? best : sample)};
    }
}
