#define _GNU_SOURCE
/* The GGUF reader: what opens can be read to its last byte. */
#include "files.h"
#include "gguf.h"

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t room, unsigned seed) {
    return mutate_file(data, n, room, seed);
}

static unsigned sum; /* of all that a view shows: reading it is the test */

static void read_all(const void *at, uint64_t n) {
    for (uint64_t i = 0; i < n; i++) sum += ((const uint8_t *)at)[i];
}

/* Values as those who look for one of them read it, be it of the kind that they want or not. */
static void read_value(const gguf *file, int32_t i) {
    const gguf_value *v = &file->values[i];
    int64_t whole;
    double number;
    gguf_text text;
    if (gguf_integer(v, &whole) || gguf_float(v, &number)) read_all(v->data, v->bytes);
    if (gguf_string(v, &text))
        MUST(text.n + 8 == v->bytes, "a string of %llu bytes in %llu", (unsigned long long)text.n,
             (unsigned long long)v->bytes);
    for (uint64_t k = 0; k < v->count + 1 && k < 100; k++)
        if (gguf_element(v, k, &whole))
            MUST(k < v->count, "element %llu of %llu", (unsigned long long)k, (unsigned long long)v->count);
}

static void read_file(const dg_file *file) {
    dg_file_value v;
    dg_file_tensor t;
    for (int32_t i = 0; dg_file_value_at(file, i, &v); i++) {
        read_all(v.key, v.key_bytes), read_all(v.data, v.bytes);
        read_value(file, i);
    }
    for (int32_t i = 0; dg_file_tensor_at(file, i, &t); i++) {
        read_all(t.name, t.name_bytes), read_all(t.data, t.bytes);
        MUST(t.bytes <= dg_file_bytes(file), "a tensor of %llu bytes", (unsigned long long)t.bytes);
    }
    MUST(dg_file_parts(file) >= 1, "%d parts", dg_file_parts(file));
    if (gguf_find_tensor(file, "t0")) MUST(file->n_tensors, "a tensor of none");
}

static int open_and_read(const void *path, dg_error *error) {
    dg_file *file;
    int status = dg_file_open(path, &file, error);
    if (status != DG_OK) return status;
    read_file(file);
    status = dg_file_check(file, error);
    dg_file_free(file);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    const char *first = file_of(data, n);
    try_twice(open_and_read, first, data, n);
    const int count = parts_of(data, n).count;
    if (count > 1) try_twice(open_and_read, part_path(count - 1, count), data, n); /* which is not the one to open */
    return 0;
}
