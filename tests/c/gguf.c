#define _GNU_SOURCE /* mkstemp */
/* The GGUF reader on whole, cut and damaged files: it reads what is there and never past it. */
#include "gguf.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "check.h"

/* A file under construction. */
static uint8_t bytes[4096];
static size_t n_bytes;

static void put(const void *data, size_t n) {
    memcpy(bytes + n_bytes, data, n);
    n_bytes += n;
}
static void put32(uint32_t v) { put(&v, 4); }
static void put64(uint64_t v) { put(&v, 8); }
static void put_text(const char *s) {
    put64(strlen(s));
    put(s, strlen(s));
}

static size_t version_at, n_tensors_at, array_at, dims_at, type_at, offset_at;

static void build(void) {
    n_bytes = 0;
    put("GGUF", 4);
    version_at = n_bytes, put32(3);
    n_tensors_at = n_bytes, put64(1);
    put64(4);
    put_text("a.number"), put32(4), put32(42);
    put_text("a.float"), put32(6), put("\0\0\200\77", 4); /* 1.0 */
    put_text("a.text"), put32(8), put_text("hello");
    put_text("some.strings"), put32(9), put32(8), array_at = n_bytes, put64(2), put_text("x"), put_text("");
    put_text("w"), put32(2);
    dims_at = n_bytes, put64(32), put64(2);
    type_at = n_bytes, put32(8);
    offset_at = n_bytes, put64(0);
    while (n_bytes % 32) put("", 1);
    for (int i = 0; i < 2 * 34; i++) put("\1", 1);
}

static char path[] = "/tmp/dgemma-test-gguf-XXXXXX";

static int open_bytes(gguf **file, dg_error *error) {
    FILE *f = fopen(path, "wb");
    fwrite(bytes, 1, n_bytes, f);
    fclose(f);
    return gguf_open(path, file, error);
}

static void expect_refusal(const char *what) {
    gguf *file;
    dg_error error = {0};
    const int status = open_bytes(&file, &error);
    CHECK(status != DG_OK && file == NULL, "%s was accepted", what);
    CHECK(strstr(error.message, path) && !strchr(error.message, '\n'), "%s: the message is '%s'", what, error.message);
    if (status == DG_OK) gguf_close(file);
}

static void test_whole(void) {
    gguf *file;
    dg_error error = {0};
    build();
    CHECK(open_bytes(&file, &error) == DG_OK, "%s", error.message);
    if (!file) return;
    int64_t number = 0;
    double real = 0.0;
    gguf_text text;
    CHECK(gguf_integer(gguf_find(file, "a.number"), &number) && number == 42, "a.number is %lld", (long long)number);
    CHECK(gguf_float(gguf_find(file, "a.float"), &real) && real == 1.0, "a.float is %g", real);
    CHECK(gguf_string(gguf_find(file, "a.text"), &text) && gguf_text_is(text, "hello"), "a.text");
    CHECK(!gguf_integer(gguf_find(file, "a.text"), &number) && !gguf_find(file, "a.other"), "kinds and absence");
    const gguf_value *strings = gguf_find(file, "some.strings");
    const uint8_t *cursor = strings->data;
    CHECK(strings->count == 2 && gguf_text_is(gguf_next_string(&cursor), "x") && gguf_text_is(gguf_next_string(&cursor), ""), "strings");
    const gguf_tensor *t = gguf_find_tensor(file, "w");
    CHECK(t && t->dims[0] == 32 && t->dims[1] == 2 && t->format->id == DG_Q8_0 && t->bytes == 68 && t->data[67] == 1, "tensor w");
    gguf_close(file);
}

static void test_damaged(void) {
    build();
    const size_t whole = n_bytes;
    for (size_t cut = 0; cut < whole; cut++) {
        build();
        n_bytes = cut;
        expect_refusal("a file cut short");
    }
    const struct { const char *what; size_t *at; uint64_t value; size_t size; } lies[] = {
        {"version 1", &version_at, 1, 4}, {"a big-endian version", &version_at, 0x03000000, 4},
        {"a tensor count of 2^63", &n_tensors_at, 1ull << 63, 8}, {"2 tensors where 1 is", &n_tensors_at, 2, 8},
        {"an array of 2^62", &array_at, 1ull << 62, 8}, {"an array of 5", &array_at, 5, 8},
        {"a dim of 0", &dims_at, 0, 8}, {"dims whose product overflows", &dims_at, 1ull << 62, 8}, {"a row of half a block", &dims_at, 16, 8},
        {"more data than there is", &dims_at, 64, 8}, {"an unknown type", &type_at, 9999, 4}, {"an offset past the end", &offset_at, 1ull << 40, 8},
        {"an offset that overflows", &offset_at, ~31ull, 8}, {"an unaligned offset", &offset_at, 4, 8},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        build();
        memcpy(bytes + *lies[i].at, &lies[i].value, lies[i].size);
        expect_refusal(lies[i].what);
    }
    build();
    bytes[0] = 'g';
    expect_refusal("a wrong magic");
    unsigned seed = 1;
    for (int i = 0; i < 2000; i++) { /* any byte changed: refused or read, never a crash */
        build();
        seed = seed * 1103515245u + 12345u;
        bytes[seed / 7 % n_bytes] ^= (uint8_t)(1u << (seed >> 28 & 7));
        gguf *file;
        dg_error error = {0};
        if (open_bytes(&file, &error) == DG_OK) gguf_close(file);
    }
    gguf *file;
    dg_error error = {0};
    CHECK(gguf_open("/nonexistent/model.gguf", &file, &error) == DG_ERROR_SYSTEM && strstr(error.message, "/nonexistent/model.gguf"), "%s", error.message);
    CHECK(gguf_open("/tmp", &file, &error) == DG_ERROR_SYSTEM && strstr(error.message, "regular"), "%s", error.message);
}

int main(void) {
    const int fd = mkstemp(path);
    if (fd < 0) return 1;
    close(fd);
    test_whole();
    test_damaged();
    unlink(path);
    return check_done("gguf");
}
