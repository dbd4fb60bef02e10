#define _GNU_SOURCE /* mkstemp, mkdtemp */
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
    CHECK(strings->count == 2 && gguf_text_is(gguf_next_string(&cursor), "x") &&
              gguf_text_is(gguf_next_string(&cursor), ""),
          "strings");
    const gguf_tensor *t = gguf_find_tensor(file, "w");
    CHECK(t && t->dims[0] == 32 && t->dims[1] == 2 && t->format->id == DG_Q8_0 && t->bytes == 68 && t->data[67] == 1,
          "tensor w");
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
    const struct {
        const char *what;
        size_t *at;
        uint64_t value;
        size_t size;
    } lies[] = {
        {"version 1", &version_at, 1, 4},
        {"a big-endian version", &version_at, 0x03000000, 4},
        {"a tensor count of 2^63", &n_tensors_at, 1ull << 63, 8},
        {"2 tensors where 1 is", &n_tensors_at, 2, 8},
        {"an array of 2^62", &array_at, 1ull << 62, 8},
        {"an array of 5", &array_at, 5, 8},
        {"a dim of 0", &dims_at, 0, 8},
        {"dims whose product overflows", &dims_at, 1ull << 62, 8},
        {"more data than there is", &dims_at, 64, 8},
        {"more data of a type that is not read", &type_at, 25 /* I16 */, 4},
        {"an offset past the end", &offset_at, 1ull << 40, 8},
        {"an offset that overflows", &offset_at, ~31ull, 8},
        {"an offset of 2^63", &offset_at, 1ull << 63, 8},
        {"an unaligned offset", &offset_at, 4, 8},
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
    CHECK(gguf_open("/nonexistent/model.gguf", &file, &error) == DG_ERROR_SYSTEM &&
              strstr(error.message, "/nonexistent/model.gguf"),
          "%s", error.message);
    CHECK(gguf_open("/tmp", &file, &error) == DG_ERROR_SYSTEM && strstr(error.message, "regular"), "%s", error.message);
}

/* A file with types that this build does not read, or that nobody knows, is told all the same. */
static void test_other_types(void) {
    const struct {
        uint32_t type;
        const char *name;
        uint64_t bytes;
    } types[] = {
        {39, "MXFP4", 34},      {3, "Q4_1", 40}, {24, "I8", 64},     {9999, NULL, 0},
        {0x80000000u, NULL, 0}, {12, "Q4_K", 0}, {16, "IQ2_XXS", 0}, /* rows of 32 values are no whole number of their
                                                                        blocks */
    };
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        gguf *file;
        dg_error error = {0};
        build();
        memcpy(bytes + type_at, &types[i].type, 4);
        CHECK(open_bytes(&file, &error) == DG_OK, "%s", error.message);
        if (!file) continue;
        const gguf_tensor *t = gguf_find_tensor(file, "w");
        CHECK(t && (uint32_t)t->type == types[i].type && t->bytes == types[i].bytes, "type %u", types[i].type);
        const bool told = t->format ? types[i].name && strcmp(t->format->name, types[i].name) == 0 : !types[i].name;
        CHECK(told && (!t->format || !t->format->decode || !t->bytes), "type %u", types[i].type);
        gguf_close(file);
    }
}

/* What is given in a GGUF file's place is told for what it is. */
static void test_mistaken(void) {
    const struct {
        const char *data;
        size_t n;
        const char *expected;
    } files[] = {
        {"", 0, "the file is empty"},
        {"\x10\0\0\0\0\0\0\0{\"a\":[]}       ", 24, "but safetensors"},
        {"PK\3\4", 4, "but a zip archive"},
        {"\x80\2c", 3, "but a Python pickle"},
        {"version https://git-lfs.github.com/spec/v1", 42, "but a Git LFS pointer"},
        {"<!DOCTYPE html>", 15, "but a web page"},
        {"GGU", 3, "does not begin with 'GGUF'"},
        {"P", 1, "does not begin with 'GGUF'"},
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        gguf *file;
        dg_error error = {0};
        n_bytes = 0;
        put(files[i].data, files[i].n);
        CHECK(open_bytes(&file, &error) == DG_ERROR_FORMAT, "%s", files[i].expected);
        CHECK(strstr(error.message, files[i].expected), "'%s' says nothing of '%s'", error.message, files[i].expected);
    }
}

/* Two tensors of one block in one file, the second where `offset` says. */
static void expect_pair_refused(const char *first, const char *second, uint64_t offset, const char *expected) {
    n_bytes = 0;
    put("GGUF", 4), put32(3), put64(2), put64(0);
    put_text(first), put32(1), put64(32), put32(8), put64(0);
    put_text(second), put32(1), put64(32), put32(8), put64(offset);
    while (n_bytes % 32) put("", 1);
    for (int i = 0; i < 34 + 64; i++) put("\1", 1);
    expect_refusal(expected);
    gguf *file;
    dg_error error = {0};
    CHECK(open_bytes(&file, &error) == DG_ERROR_FORMAT && strstr(error.message, expected), "'%s' says nothing of '%s'",
          error.message, expected);
}

static void test_pairs(void) {
    expect_pair_refused("w", "w", 64, "tensor 'w' is there twice");
    expect_pair_refused("w", "v", 32, "tensor 'v' begins within another's bytes");
    expect_pair_refused("w", "w", 0, "twice");
    expect_pair_refused("a\nb", "a\nb", 64,
                        "tensor 'a?b' is there twice"); /* a message is one line, whatever a name holds */
}

/* ---- Split files ---- */

static char folder[] = "/tmp/dgemma-test-parts-XXXXXX";
static char part_path[128];

static const char *part_name(int no, int count) {
    snprintf(part_path, sizeof part_path, "%s/m-%05d-of-%05d.gguf", folder, no + 1, count);
    return part_path;
}

/* A part with one tensor of 32 values, all `no`. */
static void write_part(const char *to, int no, int count, int all, const char *tensor) {
    n_bytes = 0;
    put("GGUF", 4), put32(3), put64(1), put64(no == 0 ? 4 : 3);
    if (no == 0) put_text("a.number"), put32(4), put32(42);
    put_text("split.no"), put32(2), put(&(uint16_t){(uint16_t)no}, 2);
    put_text("split.count"), put32(2), put(&(uint16_t){(uint16_t)count}, 2);
    put_text("split.tensors.count"), put32(5), put32((uint32_t)all);
    put_text(tensor), put32(1), put64(32), put32(8), put64(0);
    while (n_bytes % 32) put("", 1);
    put("\0\0", 2);
    for (int i = 0; i < 32; i++) put(&(uint8_t){(uint8_t)no}, 1);
    FILE *f = fopen(to, "wb");
    fwrite(bytes, 1, n_bytes, f);
    fclose(f);
}

static void write_parts(void) {
    const char *const names[] = {"w", "v", "u"};
    for (int no = 0; no < 3; no++) write_part(part_name(no, 3), no, 3, 3, names[no]);
}

static void expect_parts_refused(const char *what, const char *words, const char *file_in_message) {
    gguf *file;
    dg_error error = {0};
    const int status = gguf_open(part_name(0, 3), &file, &error);
    CHECK(status != DG_OK && file == NULL, "%s was accepted", what);
    CHECK(strstr(error.message, words) && strstr(error.message, file_in_message), "%s: the message is '%s'", what,
          error.message);
    if (status == DG_OK) gguf_close(file);
}

static void test_parts(void) {
    gguf *file;
    dg_error error = {0};
    write_parts();
    CHECK(gguf_open(part_name(0, 3), &file, &error) == DG_OK, "%s", error.message);
    if (!file) return;
    CHECK(file->n_tensors == 3 && file->n_others == 2 && dg_file_parts(file) == 3, "3 tensors in 3 parts");
    CHECK(dg_file_bytes(file) > file->size, "the bytes of all parts");
    const char *const names[] = {"w", "v", "u"};
    for (int i = 0; i < 3; i++) {
        const gguf_tensor *t = gguf_find_tensor(file, names[i]);
        CHECK(t && t == &file->tensors[i] && t->data[2] == i && t->data[33] == i, "tensor %s has its part's data",
              names[i]);
        dg_file_tensor view;
        CHECK(dg_file_tensor_at(file, i, &view) && view.data == t->data && view.type == DG_Q8_0 && view.bytes == 34 &&
                  view.dims[0] == 32,
              "its view");
    }
    dg_file_value value;
    CHECK(dg_file_value_at(file, 0, &value) && value.key_bytes == 8 && value.kind == GGUF_U32 && value.data[0] == 42,
          "a value's view");
    CHECK(!dg_file_value_at(file, 4, &value) && !dg_file_value_at(file, -1, &value), "past the values");
    dg_file_tensor none;
    CHECK(!dg_file_tensor_at(file, 3, &none) && !dg_file_tensor_at(file, -1, &none), "past the tensors");
    gguf_close(file);

    CHECK(gguf_open(part_name(1, 3), &file, &error) == DG_ERROR_FORMAT && !file,
          "a part that is not the first was accepted");
    CHECK(strstr(error.message, "-00001-of-00003.gguf"), "%s", error.message);
    unlink(part_name(1, 3));
    expect_parts_refused("a missing part", "cannot open", "m-00002-of-00003.gguf");
    char target[128];
    snprintf(target, sizeof target, "%s", part_name(0, 3));
    CHECK(symlink(target, part_name(1, 3)) == 0, "symlink");
    expect_parts_refused("a part that is the first again", "this is part 1 of 3; part 2 of 3", "m-00002-of-00003.gguf");
    unlink(part_name(1, 3));
    write_part(part_name(1, 3), 1, 4, 3, "v");
    expect_parts_refused("a part of four", "part 2 of 4", "m-00002-of-00003.gguf");
    write_part(part_name(1, 3), 1, 3, 9, "v");
    expect_parts_refused("another file's part", "another file", "m-00002-of-00003.gguf");
    write_part(part_name(1, 3), 1, 3, 3, "w");
    expect_parts_refused("a tensor twice", "'w' is in more than one part", "m-00001-of-00003.gguf");
    for (int no = 0; no < 3; no++) write_part(part_name(no, 3), no, 3, 4, no == 0 ? "w" : no == 1 ? "v" : "u");
    expect_parts_refused("a tensor less than promised", "3 tensors, expected 4", "m-00001-of-00003.gguf");
    write_parts();
    CHECK(truncate(part_name(2, 3), 150) == 0, "truncate");
    expect_parts_refused("a part cut short", "truncated", "m-00003-of-00003.gguf");
    write_part(part_name(0, 3), 0, 3, -1, "w");
    expect_parts_refused("a negative count", "split.tensors.count", "m-00001-of-00003.gguf");
    for (int no = 0; no < 3; no++) unlink(part_name(no, 3));

    /* a lone file may say that it is the only part, and one of several needs its name */
    write_part(path, 0, 1, 1, "w");
    CHECK(gguf_open(path, &file, &error) == DG_OK && file->n_tensors == 1, "%s", error.message);
    gguf_close(file);
    write_part(path, 0, 3, 3, "w");
    CHECK(gguf_open(path, &file, &error) == DG_ERROR_FORMAT && strstr(error.message, "-00001-of-00003.gguf"), "%s",
          error.message);
}

int main(void) {
    const int fd = mkstemp(path);
    if (fd < 0) return 1;
    close(fd);
    test_whole();
    test_damaged();
    test_other_types();
    test_mistaken();
    test_pairs();
    if (!mkdtemp(folder)) return 1;
    test_parts();
    rmdir(folder);
    unlink(path);
    return check_done("gguf");
}
