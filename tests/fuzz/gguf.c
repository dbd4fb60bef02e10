#define _GNU_SOURCE /* mkstemp, ftruncate, pwrite */
/* The GGUF reader and the vocabulary's: what opens can be read to its last byte. */
#include "dg.h"
#include "files.h"

static unsigned sum; /* of all that a view shows: reading it is the test */

static void read_all(const void *at, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) sum += ((const uint8_t *)at)[i];
}

static void read_file(dg_file *file) {
    dg_file_value v;
    dg_file_tensor t;
    for (int32_t i = 0; dg_file_value_at(file, i, &v); i++) read_all(v.key, v.key_bytes), read_all(v.data, v.bytes);
    for (int32_t i = 0; dg_file_tensor_at(file, i, &t); i++) {
        read_all(t.name, t.name_bytes), read_all(t.data, t.bytes);
        MUST(t.bytes <= dg_file_bytes(file), "a tensor of %llu bytes", (unsigned long long)t.bytes);
    }
}

/* Any vocabulary that opens takes any text, and its own ids. */
static void use_tokenizer(const dg_tokenizer *tokenizer) {
    static const char sample[] = "a b<bos>\n\n\xC3\xA9\xF0\x9F\x98\x80\xFF<|\"|>ab  <0x0A>";
    int32_t ids[256];
    char out[512];
    size_t n, n_bytes;
    dg_error error;
    const int32_t n_vocab = dg_tokenizer_vocab(tokenizer)->n_vocab;
    for (int special = 0; special < 2; special++) {
        MUST(dg_tokenize(tokenizer, sample, sizeof sample - 1, special, ids, 256, &n, &error) == DG_OK, "%s", error.message);
        for (size_t i = 0; i < n && i < 256; i++) MUST(ids[i] >= 0 && ids[i] < n_vocab, "id %d of %d", ids[i], n_vocab);
        for (int32_t id = 0; id < n_vocab && id < 256; id++) ids[id] = id;
        MUST(dg_detokenize(tokenizer, ids, (size_t)(n_vocab < 256 ? n_vocab : 256), special, out, sizeof out, &n_bytes, &error) == DG_OK, "%s", error.message);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    const char *path = file_of(data, n);
    dg_error error = {0};
    dg_file *file;
    int status = dg_file_open(path, &file, &error);
    if (status != DG_OK) return check_refusal(status, &error), 0;
    read_file(file);
    dg_file_free(file);
    dg_tokenizer *tokenizer;
    status = dg_tokenizer_open(path, &tokenizer, &error);
    if (status != DG_OK) return check_refusal(status, &error), 0;
    use_tokenizer(tokenizer);
    dg_tokenizer_free(tokenizer);
    return 0;
}
