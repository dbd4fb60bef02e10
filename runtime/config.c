#include "config.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "error.h"
#include "gguf_kind.h"
#include "lists.h"
#include "tokenizer.h"

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

/* Checks a value of the file against its line in limits.def. */
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

/* Checks the file's values against limits.def and against what the mathematics assumes. */
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
        {.holds = c->head_dim % 2 == 0, .id = KEY_head_dim, .expected = "an even size"},
        {.holds = c->head_dim_swa % 2 == 0, .id = KEY_head_dim_swa, .expected = "an even size"},
        {.holds = c->n_head * c->head_dim <= MOST_HEADS && c->n_head * c->head_dim_swa <= MOST_HEADS,
         .id = KEY_n_head,
         .expected = "at most 65536 values of all heads together"},
        {.holds = c->value_dim == c->head_dim,
         .id = KEY_value_dim,
         .expected = "the key length (other sizes are not supported)"},
        {.holds = c->value_dim_swa == c->head_dim_swa,
         .id = KEY_value_dim_swa,
         .expected = "the key length (other sizes are not supported)"},
        {.holds = c->rope_dim == c->head_dim, .id = KEY_rope_dim, .expected = "the key length"},
        {.holds = c->rope_dim_swa == c->head_dim_swa, .id = KEY_rope_dim_swa, .expected = "the key length"},
        {.holds = c->rope_base > 0, .id = KEY_rope_base, .expected = "a positive base"},
        {.holds = c->rope_base_swa > 0, .id = KEY_rope_base_swa, .expected = "a positive base"},
        {.holds = c->rms_eps > 0, .id = KEY_rms_eps, .expected = "a positive number"},
        {.holds = c->softcap > 0, .id = KEY_softcap, .expected = "a positive number"},
        {.holds = c->n_expert_used <= c->n_expert, .id = KEY_n_expert_used, .expected = "1 to expert_count"},
        {.holds = c->shared_kv_layers == 0, .id = KEY_shared_kv_layers, .expected = "0 (sharing is not supported)"},
        {.holds = c->d_per_layer_input == 0,
         .id = KEY_d_per_layer_input,
         .expected = "0 (per-layer inputs are not supported)"},
        {.holds = c->causal == 0, .id = KEY_causal, .expected = "false"},
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

int config_read(const gguf *f, dg_config *c, dg_tokenizer **tokenizer, dg_error *error) {
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
    const int status = config_read(file, out, &tokenizer, error);
    dg_tokenizer_free(tokenizer);
    return gguf_verdict(file, status, error);
}
