/* Opens a model: reads its configuration and binds every weight, checked, in one place. */
#include "model.h"

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "gguf_kind.h"
#include "memory/budget.h"
#include "memory/ram.h"
#include "memory/vram.h"
#include "lists.h"
#include "tokenizer.h"

/* ---- Configuration ---- */

static int wrong_value(const gguf *f, key_id id, const char *expected, dg_error *error) {
    return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s': expected %s", f->path, key_name(id), expected);
}

static int missing_value(const gguf *f, key_id id, dg_error *error) {
    return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s' is missing", f->path, key_name(id));
}

static int read_integer(const gguf *f, key_id id, int32_t *out, dg_error *error) {
    int64_t v;
    const gguf_value *value = gguf_find(f, key_name(id));
    if (!gguf_integer(value, &v) || v < 0 || v > INT32_MAX)
        return wrong_value(f, id, "a whole number of at most 2^31 - 1", error);
    *out = (int32_t)v;
    return DG_OK;
}

static int read_float(const gguf *f, key_id id, float *out, dg_error *error) {
    double v;
    if (!gguf_float(gguf_find(f, key_name(id)), &v) || !(fabs(v) <= (double)FLT_MAX))
        return wrong_value(f, id, "a finite float", error);
    *out = (float)v;
    return DG_OK;
}

/* One number per layer: an array of n_layer, or one number for all. */
static int read_per_layer(const gguf *f, key_id id, int32_t *out, int32_t n_layer, dg_error *error) {
    const gguf_value *value = gguf_find(f, key_name(id));
    for (int32_t l = 0; l < n_layer; l++) {
        int64_t v;
        const bool found = value->kind == GGUF_ARRAY
                               ? value->count == (uint64_t)n_layer && gguf_element(value, (uint64_t)l, &v)
                               : gguf_integer(value, &v);
        if (!found || v < 0 || v > INT32_MAX) return wrong_value(f, id, "one whole number per layer", error);
        out[l] = (int32_t)v;
    }
    return DG_OK;
}

/* Where a claim is within limits.def. */
static int within(const gguf *f, const char *field, key_id id, int64_t claimed, dg_error *error) {
    for (int32_t i = 0; dg_limit_at(i); i++) {
        const dg_limit *l = dg_limit_at(i);
        if (strcmp(l->field, field) != 0 || (claimed >= l->least && claimed <= l->most)) continue;
        return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s' claims %lld%s; this runs %lld to %lld", f->path,
                    key_name(id), (long long)claimed, id == KEY_tokens ? " tokens" : "", (long long)l->least,
                    (long long)l->most);
    }
    return DG_OK;
}

#define READ_U32 read_integer
#define READ_BOOL read_integer
#define READ_F32 read_float

static int read_config(const gguf *f, dg_config *c, dg_error *error) {
    int status = gguf_kind_check(f, error);
    if (status != DG_OK) return status;
#define DG_REQUIRED_KEY(kind, field, key) \
    if (status != DG_OK) return status;   \
    status = gguf_find(f, key) ? READ_##kind(f, KEY_##field, &c->field, error) : missing_value(f, KEY_##field, error);
#define DG_KEY(kind, field, key, absent)   \
    if (status != DG_OK) return status;    \
    c->field = (DG_MEMBER_##kind)(absent); \
    if (gguf_find(f, key)) status = READ_##kind(f, KEY_##field, &c->field, error);
#include "metadata.def"
    if (status != DG_OK) return status;
    status = within(f, "n_layer", KEY_n_layer, c->n_layer, error);
#define DG_LAYER_KEY(kind, field, key)                                                       \
    if (status != DG_OK) return status;                                                      \
    status = gguf_find(f, key) ? read_per_layer(f, KEY_##field, c->field, c->n_layer, error) \
                               : missing_value(f, KEY_##field, error);
#include "metadata.def"
    return status;
}

enum { MOST_HEADS = 1 << 16 }; /* values of all heads together, of a row */

/* What a file may claim, and what the mathematics takes for granted. */
static int check_config(const gguf *f, const dg_config *c, dg_error *error) {
#define DG_LIMIT(field, named, least, most) \
    if (within(f, #field, KEY_##named, c->field, error) != DG_OK) return DG_ERROR_FORMAT;
#include "limits.def"
#undef DG_LIMIT
    const struct {
        bool holds;
        key_id id;
        const char *expected;
    } rules[] = {
        {c->head_dim % 2 == 0, KEY_head_dim, "an even size"},
        {c->head_dim_swa % 2 == 0, KEY_head_dim_swa, "an even size"},
        {c->n_head * c->head_dim <= MOST_HEADS && c->n_head * c->head_dim_swa <= MOST_HEADS, KEY_n_head,
         "at most 65536 values of all heads together"},
        {c->value_dim == c->head_dim, KEY_value_dim, "the key length (other sizes are not supported)"},
        {c->value_dim_swa == c->head_dim_swa, KEY_value_dim_swa, "the key length (other sizes are not supported)"},
        {c->rope_dim == c->head_dim, KEY_rope_dim, "the key length"},
        {c->rope_dim_swa == c->head_dim_swa, KEY_rope_dim_swa, "the key length"},
        {c->rope_base > 0, KEY_rope_base, "a positive base"},
        {c->rope_base_swa > 0, KEY_rope_base_swa, "a positive base"},
        {c->rms_eps > 0, KEY_rms_eps, "a positive number"},
        {c->softcap > 0, KEY_softcap, "a positive number"},
        {c->n_expert_used <= c->n_expert, KEY_n_expert_used, "1 to expert_count"},
        {c->shared_kv_layers == 0, KEY_shared_kv_layers, "0 (sharing is not supported)"},
        {c->d_per_layer_input == 0, KEY_d_per_layer_input, "0 (per-layer inputs are not supported)"},
        {c->causal == 0, KEY_causal, "false"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++)
        if (!rules[i].holds) return wrong_value(f, rules[i].id, rules[i].expected, error);
    for (int32_t l = 0; l < c->n_layer; l++)
        if (c->n_head_kv[l] < 1 || c->n_head % c->n_head_kv[l])
            return wrong_value(f, KEY_n_head_kv, "divisors of head_count", error);
    return DG_OK;
}

static int add_end_id(dg_config *c, int64_t id) {
    if (id < 0 || id >= c->n_vocab || c->n_end_ids == DG_MAX_END_IDS) return false;
    for (int32_t i = 0; i < c->n_end_ids; i++)
        if (c->end_ids[i] == id) return true;
    c->end_ids[c->n_end_ids++] = (int32_t)id;
    return true;
}

/* Reads the ids that end an answer. A file of another origin names one id and has no list of ids: the marks that end an
 * answer are added by name. With a list, an answer also ends at the mark that ends turns in the file's template, and at
 * marks that the file calls ordinary text. */
static int read_end_ids(const gguf *f, const dg_tokenizer *tokenizer, dg_config *c, dg_error *error) {
    const gguf_value *list = gguf_find(f, key_name(KEY_end_token_ids));
    for (uint64_t i = 0; list && i < list->count; i++) {
        int64_t id;
        if (!gguf_element(list, i, &id) || !add_end_id(c, id))
            return wrong_value(f, KEY_end_token_ids, "an array of at most 16 token ids", error);
    }
    const bool listed = c->n_end_ids > 0;
    if (!listed) add_end_id(c, dg_tokenizer_vocab(tokenizer)->eos_id);
    int32_t id;
    bool always;
    for (int32_t i = 0; tokenizer_end_mark(tokenizer, i, &id, &always); i++)
        if (!listed || always) add_end_id(c, id);
    return DG_OK;
}

/* ---- Weights ---- */

static weight_walk all_weights(dg_model *m) {
    return (weight_walk){.top = &m->top, .layers = m->layers, .config = &m->config};
}

struct decoded {
    struct decoded *next;
    float values[];
};

/* Norms, scales and the router are computed with in float32: a copy that the model owns stands for another format. */
static int decode_floats(dg_model *m, tensor *t, dg_error *error) {
    const int64_t count = t->cols * t->rows * t->experts;
    struct decoded *copy = malloc(sizeof *copy + (size_t)count * sizeof(float));
    if (!copy) return fail(error, DG_ERROR_SYSTEM, "%s: no memory for %lld values", m->file->path, (long long)count);
    copy->next = m->decoded;
    m->decoded = copy;
    t->format->decode(t->data, copy->values, count / t->format->block);
    t->format = dg_format_find(DG_F32);
    t->data = (const uint8_t *)copy->values;
    t->row_bytes = t->cols * (int64_t)sizeof(float);
    t->expert_bytes = t->rows * t->row_bytes;
    return DG_OK;
}

static void free_decoded(struct decoded *copy) {
    while (copy) {
        struct decoded *next = copy->next;
        free(copy);
        copy = next;
    }
}

static bool is_embedding(int32_t i) {
    return weight_lines[i].scope == WEIGHT_TOP && weight_lines[i].offset == offsetof(top_weights, token_embd);
}

/* Binds line i of tensors.def, of one layer, into *out; *found says whether the file has it. */
static int bind(dg_model *m, int32_t i, int32_t l, tensor *out, bool *found, uint8_t *seen, dg_error *error) {
    const gguf *f = m->file;
    char name[128];
    snprintf(name, sizeof name, dg_tensor_entry_at(i)->gguf, l);
    const gguf_tensor *t = gguf_find_tensor(f, name);
    if (!t && is_embedding(i)) t = gguf_find_tensor(f, strcpy(name, dg_head_name()));
    *found = t != NULL;
    if (!t) return DG_OK;
    seen[t - f->tensors] = 1;
    int64_t dims[3];
    dg_tensor_dims(i, &m->config, l, dims);
    if (t->dims[0] != dims[0] || t->dims[1] != dims[1] || t->dims[2] != dims[2] || t->dims[3] != 1)
        return fail(error, DG_ERROR_FORMAT,
                    "%s: tensor '%s' has shape %lld x %lld x %lld; the metadata asks for %lld x %lld x %lld", f->path,
                    name, (long long)t->dims[0], (long long)t->dims[1], (long long)t->dims[2], (long long)dims[0],
                    (long long)dims[1], (long long)dims[2]);
    if (!t->format)
        return fail(error, DG_ERROR_FORMAT,
                    "%s: tensor '%s' is of type number %u, which this build does not know: "
                    "running needs a file of other types",
                    f->path, name, (unsigned)t->type);
    if (!t->format->decode)
        return fail(error, DG_ERROR_FORMAT,
                    "%s: tensor '%s' is %s, which this build does not read: "
                    "running needs a file of other types",
                    f->path, name, t->format->name);
    if (dims[0] % t->format->block)
        return fail(error, DG_ERROR_FORMAT,
                    "%s: tensor '%s': rows of %lld values are no whole number of %s blocks of %d", f->path, name,
                    (long long)dims[0], t->format->name, t->format->block);
    const int64_t row = dims[0] / t->format->block * t->format->bytes;
    *out = (tensor){
        .format = t->format,
        .data = t->data,
        .cols = dims[0],
        .rows = dims[1],
        .experts = dims[2],
        .row_bytes = row,
        .expert_bytes = row * dims[1],
    };
    const weight_kind kind = weight_lines[i].kind;
    const bool any_format = kind == WEIGHT_MATRIX || kind == WEIGHT_TABLE;
    return any_format || t->format->id == DG_F32 ? DG_OK : decode_floats(m, out, error);
}

/* Files hold gate and up fused, or in two tensors: both become two views. */
static void split_gate_up(layer *w, int32_t d_expert) {
    if (!w->ffn_gate_up_exps.data) return;
    w->ffn_gate_exps = w->ffn_up_exps = w->ffn_gate_up_exps;
    w->ffn_gate_exps.rows = w->ffn_up_exps.rows = d_expert;
    w->ffn_up_exps.data += d_expert * w->ffn_up_exps.row_bytes;
}

/* A head that the file has beside the embedding. */
static int refuse_head(const dg_model *m, dg_error *error) {
    int32_t i = 0;
    while (!is_embedding(i)) i++;
    return fail(error, DG_ERROR_FORMAT,
                "%s: tensor '%s' beside '%s': here the embedding is the output head; dg-convert compares "
                "them, and makes a file without it where they are equal",
                m->file->path, dg_head_name(), dg_tensor_entry_at(i)->gguf);
}

static int bind_all(dg_model *m, bool head_copy, dg_error *error) {
    const gguf *f = m->file;
    const dg_config *c = &m->config;
    if (f->n_tensors > (uint64_t)WEIGHT_LINES * (uint64_t)(c->n_layer + 1)) /* each name is looked for among them all */
        return fail(error, DG_ERROR_FORMAT, "%s: %llu tensors, more than a model of %d layers has", f->path,
                    (unsigned long long)f->n_tensors, c->n_layer);
    uint8_t *seen = calloc(f->n_tensors + 1, 1);
    int status = seen ? DG_OK : fail(error, DG_ERROR_SYSTEM, "%s: no memory", f->path);
    weight_walk at = all_weights(m);
    for (tensor *to; status == DG_OK && (to = weight_next(&at));) {
        bool found;
        status = bind(m, at.line, at.layer, to, &found, seen, error);
        const bool may_lack = to == &m->layers[at.layer].ffn_gate_up_exps; /* older files have it split */
        if (status != DG_OK || found || may_lack) continue;
        char name[128];
        snprintf(name, sizeof name, dg_tensor_entry_at(at.line)->gguf, at.layer);
        status = fail(error, DG_ERROR_FORMAT, "%s: tensor '%s' is missing", f->path, name);
    }
    for (uint64_t i = 0; i < f->n_tensors && status == DG_OK; i++) {
        const bool head = gguf_text_is(f->tensors[i].name, dg_head_name());
        if (seen[i] || (head && head_copy)) continue;
        if (head) status = refuse_head(m, error);
        else
            status = fail(error, DG_ERROR_FORMAT, "%s: tensor '%.*s' is not part of a diffusion-gemma model", f->path,
                          (int)(f->tensors[i].name.n < 200 ? f->tensors[i].name.n : 200), f->tensors[i].name.at);
    }
    for (int32_t l = 0; l < c->n_layer; l++) split_gate_up(&m->layers[l], c->d_expert);
    free(seen);
    return status;
}

/* Bytes that the weights take on a device, without those of experts. */
static int64_t device_bytes(dg_model *m) {
    int64_t bytes = 0;
    weight_walk at = all_weights(m);
    for (const tensor *t; (t = weight_next(&at));)
        if (t->data && !weight_of_experts(&at, t)) bytes += t->rows * t->row_bytes + 2 * EXPERT_LINE;
    return bytes;
}

static void place_weights(dg_model *m) {
    weight_walk at = all_weights(m);
    for (tensor *t; (t = weight_next(&at));)
        if (t->data && !weight_of_experts(&at, t)) m->ops->place(m->ops, t);
}

/* Brings weights to where ops read them; experts follow with the first session. */
static int place_all(dg_model *m, const dg_model_options *options, dg_error *error) {
    if (options->vram < 0)
        return fail(error, DG_ERROR_USAGE, "vram: expected a number of bytes, got %lld", (long long)options->vram);
    if (!m->ops->device && options->vram)
        return fail(error, DG_ERROR_USAGE, "vram: %s computes in RAM; a budget of VRAM is for --backend cuda",
                    m->ops->name);
    if (!m->ops->device) return DG_OK;
    if (options->ram > 0)
        return fail(error, DG_ERROR_USAGE,
                    "ram: a budget of RAM is for the CPU, and the backend is %s; its own is --vram", m->ops->name);
    const int status = vram_open(m, options->vram, device_bytes(m), error);
    if (status != DG_OK) return status;
    place_weights(m);
    return ops_status(m->ops, error);
}

/* base^(-2i/dim), float32 as the model was trained with. */
static float *inverse_frequencies(const ops *o, float base, int32_t dim, const float *factors) {
    const size_t bytes = sizeof(float) * (size_t)(dim / 2);
    float *out = malloc(bytes);
    void *placed = NULL;
    for (int32_t i = 0; out && i < dim / 2; i++) {
        out[i] = (float)(1.0 / pow((double)base, (double)((float)(2 * i) / (float)dim)));
        if (factors) out[i] /= factors[i];
    }
    if (out) o->reserve(o, &placed, bytes);
    if (placed) o->upload(o, placed, out, bytes);
    free(out);
    return placed;
}

static size_t routing_bytes(const dg_config *c) { return (size_t)c->n_layer * (size_t)c->n_expert * sizeof(int64_t); }

static void *zeros(const ops *o, size_t bytes) {
    void *at = NULL, *none = calloc(1, bytes);
    if (none) o->reserve(o, &at, bytes);
    if (at) o->upload(o, at, none, bytes);
    free(none);
    return at;
}

/* ---- Opening ---- */

/* All that a file says beside its weights. *tokenizer is the caller's, whatever comes of it. */
static int configure(const gguf *f, dg_config *c, dg_tokenizer **tokenizer, dg_error *error) {
    int status = read_config(f, c, error);
    if (status == DG_OK) status = tokenizer_new(f, tokenizer, error);
    if (status != DG_OK) return status;
    c->n_vocab = dg_tokenizer_vocab(*tokenizer)->n_vocab;
    status = check_config(f, c, error);
    return status == DG_OK ? read_end_ids(f, *tokenizer, c, error) : status;
}

int dg_file_config(const dg_file *file, dg_config *out, dg_error *error) {
    dg_tokenizer *tokenizer = NULL;
    *out = (dg_config){0};
    const int status = configure(file, out, &tokenizer, error);
    dg_tokenizer_free(tokenizer);
    return gguf_verdict(file, status, error);
}

static int load(dg_model *m, const char *path, const dg_model_options *options, dg_error *error) {
    dg_config *c = &m->config;
    int status = gguf_open(path, &m->file, error);
    if (status == DG_OK) status = configure(m->file, c, &m->tokenizer, error);
    if (status != DG_OK) return status;
    m->layers = calloc((size_t)c->n_layer, sizeof *m->layers);
    if (!m->layers) return fail(error, DG_ERROR_SYSTEM, "%s: no memory", path);
    status = bind_all(m, options && options->head_copy, error);
    if (status != DG_OK) return status;
    const dg_model_options none = {0};
    if (!options) options = &none;
    if (options->ram < 0 && options->ram != DG_RAM_AUTO)
        return fail(error, DG_ERROR_USAGE, "ram: expected a number of bytes, got %lld", (long long)options->ram);
    if (options->ram > 0 && options->repack)
        return fail(
            error, DG_ERROR_USAGE,
            "repack and a RAM budget do not go together: the budget is better spent on experts that stay in memory");
    if (options->layers < 0 || options->layers > c->n_layer)
        return fail(error, DG_ERROR_USAGE, "layers: expected 1 to %d, or 0 for all, got %d", c->n_layer,
                    options->layers);
    if (options->layers) c->n_layer = options->layers;
    status = ops_new(options, c, &m->ops, error);
    if (status == DG_OK) status = place_all(m, options, error);
    if (status != DG_OK) return status;
    m->rope_full =
        inverse_frequencies(m->ops, c->rope_base, c->head_dim, (const float *)(const void *)m->top.rope_freqs.data);
    m->rope_swa = inverse_frequencies(m->ops, c->rope_base_swa, c->head_dim_swa, NULL);
    m->routing = zeros(m->ops, routing_bytes(c));
    if (!m->rope_full || !m->rope_swa || !m->routing) return fail(error, DG_ERROR_SYSTEM, "%s: no memory", path);
    if (options->repack) status = ops_repack(m->ops, m->layers, c->n_layer, options->repack, error);
    if (status == DG_OK && !m->ops->device) status = ram_decide(m, options->repack ? 0 : options->ram, &m->ram, error);
    return status == DG_OK && m->ram.budget ? budget_open(m, m->ram.budget, error) : status;
}

int dg_model_open(const char *path, const dg_model_options *options, dg_model **out, dg_error *error) {
    *out = NULL;
    dg_model *m = calloc(1, sizeof *m);
    if (!m) return fail(error, DG_ERROR_SYSTEM, "%s: no memory", path);
    int status = load(m, path, options, error);
    if (m->file) status = gguf_verdict(m->file, status, error);
    if (m->ops && status == DG_ERROR_SYSTEM) { /* what a lost backend does not give is no lack of memory */
        const int lost = ops_status(m->ops, error);
        status = lost == DG_OK ? status : lost;
    }
    if (status != DG_OK) dg_model_free(m);
    else *out = m;
    return status;
}

void dg_model_free(dg_model *m) {
    if (!m) return;
    budget_free(m);
    vram_free(m);
    if (m->ops) m->ops->release(m->ops, m->routing, routing_bytes(&m->config));
    if (m->ops) m->ops->release(m->ops, m->rope_full, sizeof(float) * (size_t)(m->config.head_dim / 2));
    if (m->ops) m->ops->release(m->ops, m->rope_swa, sizeof(float) * (size_t)(m->config.head_dim_swa / 2));
    if (m->ops) dg_profile_stop(m);
    if (m->ops) dg_moments_stop(m);
    ops_free(m->ops);
    free_decoded(m->decoded);
    free(m->layers);
    dg_tokenizer_free(m->tokenizer);
    gguf_close(m->file);
    free(m);
}
