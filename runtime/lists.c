/* Python and the runtime read the lists of this folder through these tables. */
#include "lists.h"

#include "weights.h"

static const dg_key keys[] = {
#define DG_REQUIRED_KEY(type, name, text) \
    {.field = #name, .key = text, .kind = #type, .in_config = true, .required = true},
#define DG_KEY(type, name, text, without) \
    {.field = #name, .key = text, .kind = #type, .in_config = true, .absent = without},
#define DG_LAYER_KEY(type, name, text) \
    {.field = #name, .key = text, .kind = #type, .in_config = true, .per_layer = true, .required = true},
#define DG_TEXT(type, name, text) {.field = #name, .key = text, .kind = #type},
#include "metadata.def"
};

static const dg_limit limits[] = {
#define DG_LIMIT(name, key, from, to) {.field = #name, .named = #key, .least = from, .most = to},
#include "limits.def"
#undef DG_LIMIT
};

static const dg_tensor_entry tensors[] = {
#define DG_TENSOR(of, type, name, in_gguf, in_hf, n0, n1, n2) \
    {.scope = #of, .kind = #type, .field = #name, .gguf = in_gguf, .hf = in_hf},
#include "tensors.def"
#undef DG_TENSOR
};

static const dg_option options[] = {
#define DG_OPTION(type, id, from, to, text) \
    {.name = #id, .kind = #type, .least = (double)(from), .most = (double)(to), .help = text},
#include "options.def"
#undef DG_OPTION
};

static const dg_sampler samplers[] = {
#define DG_SAMPLER(ID, name, temperature, accept, stop, help) {name, help},
#include "samplers.def"
#undef DG_SAMPLER
};

static const dg_effort efforts[] = {
#define DG_SET(option, value) #option " "
#define DG_EFFORT(id, settings, text) {.name = #id, .help = text, .sets = "" settings},
#include "efforts.def"
#undef DG_EFFORT
#undef DG_SET
};

#define AT(table, i) ((i) >= 0 && (size_t)(i) < sizeof(table) / sizeof *(table) ? &(table)[i] : NULL)

const dg_key *dg_key_at(int32_t i) { return AT(keys, i); }
const dg_limit *dg_limit_at(int32_t i) { return AT(limits, i); }
const dg_tensor_entry *dg_tensor_entry_at(int32_t i) { return AT(tensors, i); }
const char *dg_head_name(void) { return "output.weight"; }
const dg_option *dg_option_at(int32_t i) { return AT(options, i); }
const dg_sampler *dg_sampler_at(int32_t i) { return AT(samplers, i); }
const dg_effort *dg_effort_at(int32_t i) { return AT(efforts, i); }

int32_t dg_tensor_dims(int32_t i, const dg_config *c, int32_t l, int64_t dims[3]) {
    int32_t at = 0;
    dims[0] = dims[1] = dims[2] = 0;
#define DG_TENSOR(scope, kind, field, gguf, hf, n0, n1, n2)                   \
    if (at++ == i && !(WEIGHT_##scope == WEIGHT_SLIDING && !c->sliding[l])) { \
        dims[0] = n0;                                                         \
        dims[1] = n1;                                                         \
        dims[2] = n2;                                                         \
    }
#include "tensors.def"
#undef DG_TENSOR
    const int32_t n = dims[0] == 0 ? 0 : dims[1] == 0 ? 1 : dims[2] == 0 ? 2 : 3;
    for (int k = n; n > 0 && k < 3; k++) dims[k] = 1;
    return n;
}
