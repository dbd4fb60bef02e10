#include "magic.h"

#include <string.h>

#include "error.h"

/* The bytes of a kind of file from byte `at` on, and its name. The first line that fits is used. */
#define BEGINS(at, bytes, what) {at, sizeof bytes - 1, bytes, what}
static const struct {
    uint64_t at, n;
    const char *bytes, *what;
} beginnings[] = {
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
    BEGINS(0,
           "\xFD"
           "7zXZ",
           "compressed with xz: unpack it"),
    BEGINS(257, "ustar", "a tar archive: unpack it"),
    BEGINS(0, "version https://git-lfs", "a Git LFS pointer, not the file that it stands for: fetch that"),
    BEGINS(0, "<!", "a web page, not the file that it was to be"),
    BEGINS(0, "<html", "a web page, not the file that it was to be"),
    BEGINS(0, "{", "JSON"),
};
#undef BEGINS

int magic_fail(const char *path, const uint8_t *bytes, uint64_t n, dg_error *error) {
    for (size_t i = 0; i < sizeof beginnings / sizeof *beginnings; i++)
        if (n >= beginnings[i].at + beginnings[i].n &&
            memcmp(bytes + beginnings[i].at, beginnings[i].bytes, beginnings[i].n) == 0)
            return fail(error, DG_ERROR_FORMAT, "%s: not a GGUF file but %s", path, beginnings[i].what);
    return fail(error, DG_ERROR_FORMAT, "%s: not a GGUF file (it does not begin with 'GGUF')", path);
}
