/* The options of sampling: what a model uses by default, efforts, and what a caller may set. */
#include "error.h"
#include "model.h"

void dg_sampling_default(const dg_model *model, dg_sampling *s) {
    const dg_config *c = &model->config;
    *s = (dg_sampling){
        .max_tokens = 0,
        .sampler = DG_SAMPLER_ENTROPY_BOUND,
        .steps = c->steps,
        .entropy_bound = c->entropy_bound,
        .t_min = c->t_min,
        .t_max = c->t_max,
        .stability = c->stability,
        .confidence = c->confidence,
        .seed = 0,
    };
}

bool dg_effort_apply(int32_t i, dg_sampling *s) {
    int32_t at = 0;
#define DG_SET(option, value) s->option = value;
#define DG_EFFORT(name, settings, help) \
    if (at++ == i) {                    \
        settings return true;           \
    }
#include "efforts.def"
#undef DG_EFFORT
#undef DG_SET
    return false;
}

int dg_sampling_check(const dg_sampling *s, dg_error *error) {
#define CHECK_I32 "%s: expected a whole number from %.0f to %.0f, got %.0f"
#define CHECK_U64 CHECK_I32
#define CHECK_BOOL CHECK_I32
#define CHECK_SAMPLER "%s: expected the number of a sampler, from %.0f to %.0f, got %.0f"
#define CHECK_F32 "%s: expected a number from %g to %g, got %g"
#define DG_OPTION(kind, name, least, most, help)                                    \
    if (!((double)s->name >= (double)(least) && (double)s->name <= (double)(most))) \
        return fail(error, DG_ERROR_USAGE, CHECK_##kind, #name, (double)(least), (double)(most), (double)s->name);
#include "options.def"
#undef DG_OPTION
    return DG_OK;
}
