#include "gguf_kind.h"

#include <string.h>

#include "error.h"
#include "lists.h"

static gguf_text text_of(const gguf *file, key_id key) {
    gguf_text text = {"", 0};
    gguf_string(gguf_find(file, key_name(key)), &text);
    return text;
}

static bool first_tensor_has(const gguf *file, const char *ending) {
    const gguf_text name = file->n_tensors ? file->tensors[0].name : (gguf_text){"", 0};
    const size_t n = strlen(ending);
    return name.n >= n && memcmp(name.at + name.n - n, ending, n) == 0;
}

static bool is_adapter(const gguf *file, gguf_text type) {
    return gguf_text_is(type, "adapter") || gguf_find(file, "adapter.type") || first_tensor_has(file, ".lora_a") ||
           first_tensor_has(file, ".lora_b");
}

/* What a file holds that is no model of any architecture, or NULL. */
static const char *other_than_model(const gguf *file, gguf_text type, gguf_text architecture) {
    if (is_adapter(file, type))
        return "a LoRA adapter, not a model: merge it into the checkpoint that it was trained on, and convert that";
    if (gguf_text_is(type, "mmproj") || gguf_text_is(architecture, "clip"))
        return "a projector of images or sound (mmproj), which goes beside a model and is none";
    if (gguf_text_is(type, "imatrix") || gguf_find(file, "imatrix.datasets"))
        return "an importance matrix, not a model: dg-convert takes it beside a checkpoint";
    return NULL;
}

static bool is_vocabulary(const gguf *file, gguf_text type) {
    return gguf_text_is(type, "vocab") || (!file->n_tensors && gguf_find(file, key_name(KEY_tokens)));
}

static int shown(gguf_text text) { return (int)(text.n < 100 ? text.n : 100); }

int gguf_kind_check(const gguf *file, dg_error *error) {
    const gguf_text type = text_of(file, KEY_type), architecture = text_of(file, KEY_architecture);
    const char *other = other_than_model(file, type, architecture);
    if (other) return fail(error, DG_ERROR_FORMAT, "%s: %s", file->path, other);
    if (is_vocabulary(file, type))
        return fail(error, DG_ERROR_FORMAT, "%s: a vocabulary alone, of architecture '%.*s', without a model's weights",
                    file->path, shown(architecture), architecture.at);
    if (type.n && !gguf_text_is(type, "model"))
        return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s': expected 'model', found '%.*s'", file->path,
                    key_name(KEY_type), shown(type), type.at);
    if (!architecture.n)
        return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s' is missing", file->path, key_name(KEY_architecture));
    if (!gguf_text_is(architecture, "diffusion-gemma"))
        return fail(error, DG_ERROR_FORMAT, "%s: a model of architecture '%.*s'; this runs 'diffusion-gemma'",
                    file->path, shown(architecture), architecture.at);
    return DG_OK;
}
