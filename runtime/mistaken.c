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
        if (file->size >= beginnings[i].at + beginnings[i].n && memcmp(file->map + beginnings[i].at, beginnings[i].bytes, beginnings[i].n) == 0)
            return fail(error, DG_ERROR_FORMAT, "%s: not a GGUF file but %s", file->path, beginnings[i].what);
    return fail(error, DG_ERROR_FORMAT, "%s: not a GGUF file (it does not begin with 'GGUF')", file->path);
}

/* ---- GGUF files that are no model ---- */

static gguf_text text_of(const gguf *file, const char *key) {
    gguf_text text = {"", 0};
    gguf_string(gguf_find(file, key), &text);
    return text;
}

static bool first_tensor_has(const gguf *file, const char *ending) {
    const gguf_text name = file->n_tensors ? file->tensors[0].name : (gguf_text){"", 0};
    const size_t n = strlen(ending);
    return name.n >= n && memcmp(name.at + name.n - n, ending, n) == 0;
}

int mistaken_kind(const gguf *file, dg_error *error) {
    const gguf_text type = text_of(file, key_name(KEY_type)), architecture = text_of(file, key_name(KEY_architecture));
    const int n_type = (int)(type.n < 100 ? type.n : 100), n_architecture = (int)(architecture.n < 100 ? architecture.n : 100);
    if (gguf_text_is(type, "adapter") || gguf_find(file, "adapter.type") || first_tensor_has(file, ".lora_a") || first_tensor_has(file, ".lora_b"))
        return fail(error, DG_ERROR_FORMAT, "%s: a LoRA adapter, not a model: merge it into the checkpoint that it was trained on, and convert that", file->path);
    if (gguf_text_is(type, "mmproj") || gguf_text_is(architecture, "clip"))
        return fail(error, DG_ERROR_FORMAT, "%s: a projector of images or sound (mmproj), which goes beside a model and is none", file->path);
    if (gguf_text_is(type, "imatrix") || gguf_find(file, "imatrix.datasets"))
        return fail(error, DG_ERROR_FORMAT, "%s: an importance matrix, not a model: it is for dg-convert --imatrix", file->path);
    if (type.n && !gguf_text_is(type, "model") && !gguf_text_is(type, "vocab"))
        return fail(error, DG_ERROR_FORMAT, "%s: no model: %s is '%.*s'", file->path, key_name(KEY_type), n_type, type.at);
    if (gguf_text_is(type, "vocab") || (!file->n_tensors && gguf_find(file, key_name(KEY_tokens))))
        return fail(error, DG_ERROR_FORMAT, "%s: a vocabulary alone, of architecture '%.*s', without a model's weights", file->path, n_architecture, architecture.at);
    if (!architecture.n) return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s' is missing", file->path, key_name(KEY_architecture));
    if (gguf_text_is(architecture, "diffusion-gemma")) return DG_OK;
    return fail(error, DG_ERROR_FORMAT, "%s: a model of architecture '%.*s'; this runs 'diffusion-gemma'", file->path, n_architecture, architecture.at);
}
