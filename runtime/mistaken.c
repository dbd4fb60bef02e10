#include "mistaken.h"

#include <string.h>

#include "error.h"
#include "tables.h"

/* ---- Files that are no GGUF ---- */

/* How a file begins from byte `at` on, and what it then is. The first that fits. */
#define BEGINS(at, bytes, what) {at, sizeof bytes - 1, bytes, what}
static const struct { uint64_t at, n; const char *bytes, *what; } beginnings[] = {
    BEGINS(8, "{\"", "safetensors, a part of a checkpoint: dg-convert makes a GGUF file of the folder that it is in"),
    BEGINS(0, "PK\3\4", "a zip archive, as PyTorch writes checkpoints: dg-convert takes those in safetensors"),
    BEGINS(0, "\x80\2", "a Python pickle, as PyTorch wrote checkpoints: dg-convert takes those in safetensors"),
    BEGINS(0, "\x80\4", "a Python pickle, as PyTorch wrote checkpoints: dg-convert takes those in safetensors"),
    BEGINS(0, "lmgg", "a file in llama.cpp's format before GGUF"),
    BEGINS(0, "fmgg", "a file in llama.cpp's format before GGUF"),
    BEGINS(0, "tjgg", "a file in llama.cpp's format before GGUF"),
    BEGINS(0, "algg", "a LoRA adapter in llama.cpp's format before GGUF"),
    BEGINS(0, "\x1F\x8B", "compressed with gzip: unpack it"),
    BEGINS(0, "\x28\xB5\x2F\xFD", "compressed with zstd: unpack it"),
    BEGINS(0, "\xFD" "7zXZ", "compressed with xz: unpack it"),
    BEGINS(257, "ustar", "a tar archive: unpack it"),
    BEGINS(0, "version https://git-lfs", "a Git LFS pointer, not the file that it stands for: fetch that"),
    BEGINS(0, "<!", "a web page, not the file that it was to be"),
    BEGINS(0, "<html", "a web page, not the file that it was to be"),
    BEGINS(0, "{", "JSON"),
};
#undef BEGINS

int mistaken_bytes(const gguf *file, dg_error *error) {
    for (size_t i = 0; i < sizeof beginnings / sizeof *beginnings; i++)
        if (file->size >= beginnings[i].at + beginnings[i].n &&
            memcmp(file->map + beginnings[i].at, beginnings[i].bytes, beginnings[i].n) == 0)
            return fail(error, DG_ERROR_FORMAT, "%s: not a GGUF file but %s", file->path, beginnings[i].what);
    return fail(error, DG_ERROR_FORMAT, "%s: not a GGUF file (it does not begin with 'GGUF')", file->path);
}

/* ---- GGUF files that are no model ---- */

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
        return "an importance matrix, not a model: it is for dg-convert --imatrix";
    return NULL;
}

static bool is_vocabulary(const gguf *file, gguf_text type) {
    return gguf_text_is(type, "vocab") || (!file->n_tensors && gguf_find(file, key_name(KEY_tokens)));
}

static int shown(gguf_text text) { return (int)(text.n < 100 ? text.n : 100); }

int mistaken_kind(const gguf *file, dg_error *error) {
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
        return fail(error, DG_ERROR_FORMAT, "%s: a model of architecture '%.*s'; this runs 'diffusion-gemma'", file->path,
                    shown(architecture), architecture.at);
    return DG_OK;
}
