/* Opens a model: binds every weight, checked, in one place, and brings it to its backend. */
#include "model.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config.h"
#include "error.h"
#include "memory/budget.h"
#include "memory/ram.h"
#include "memory/vram.h"

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

static int refuse_vram(const ops *o, dg_error *error) {
    char backends[100] = "";
    for (int32_t i = 0; ops_with_vram(i); i++) {
        const size_t length = strlen(backends);
        snprintf(backends + length, sizeof backends - length, "%s%s", i ? " or " : "", ops_with_vram(i));
    }
    return fail(error, DG_ERROR_USAGE, "vram: %s computes in RAM; a budget of VRAM is for the backend %s", o->name,
                backends);
}

/* Brings weights to where ops read them; experts follow with the first session. */
static int place_all(dg_model *m, const dg_model_options *options, dg_error *error) {
    if (options->vram < 0)
        return fail(error, DG_ERROR_USAGE, "vram: expected a number of bytes, got %lld", (long long)options->vram);
    const bool own_memory = m->ops->backend->own_memory;
    if (!own_memory && options->vram) return refuse_vram(m->ops, error);
    if (!own_memory) return DG_OK;
    if (options->ram > 0)
        return fail(error, DG_ERROR_USAGE,
                    "ram: a budget of RAM is for the CPU, and the backend is %s; its own is vram", m->ops->name);
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

static int load(dg_model *m, const char *path, const dg_model_options *options, dg_error *error) {
    dg_config *c = &m->config;
    int status = gguf_open(path, &m->file, error);
    if (status == DG_OK) status = config_read(m->file, c, &m->tokenizer, error);
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
