#include "gguf.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "magic.h"
#include "os.h"

enum {
    GGUF_ALIGNMENT = 32,
    MOST_VALUES = 1 << 16, /* the most keys: a search for a key goes through all of them */
};

/* Types of values by their number in files; 0 bytes: the size varies. */
static const struct {
    gguf_kind kind;
    uint32_t bytes;
} kinds[] = {
    {GGUF_U8, 1},   {GGUF_I8, 1},     {GGUF_U16, 2},   {GGUF_I16, 2}, {GGUF_U32, 4}, {GGUF_I32, 4}, {GGUF_F32, 4},
    {GGUF_BOOL, 1}, {GGUF_STRING, 0}, {GGUF_ARRAY, 0}, {GGUF_U64, 8}, {GGUF_I64, 8}, {GGUF_F64, 8},
};

static uint32_t load_u32(const uint8_t *at) {
    uint32_t v;
    memcpy(&v, at, 4);
    return v;
}
static uint64_t load_u64(const uint8_t *at) {
    uint64_t v;
    memcpy(&v, at, 8);
    return v;
}

/* A cursor over the mapped file, which never passes its end. */
typedef struct reader {
    const gguf *file;
    uint64_t at;
    dg_error *error;
    bool failed;
} reader;

static bool damaged(reader *r, const char *what) {
    if (!r->failed)
        fail(r->error, DG_ERROR_FORMAT, "%s: damaged GGUF: %s at byte %llu of %llu", r->file->path, what,
             (unsigned long long)r->at, (unsigned long long)r->file->size);
    r->failed = true;
    return false;
}

static const uint8_t *take(reader *r, uint64_t bytes, const char *what) {
    if (r->failed) return NULL;
    if (bytes > r->file->size - r->at) {
        damaged(r, what);
        return NULL;
    }
    const uint8_t *at = r->file->map + r->at;
    r->at += bytes;
    return at;
}

static uint32_t take_u32(reader *r, const char *what) {
    const uint8_t *at = take(r, 4, what);
    return at ? load_u32(at) : 0;
}

static uint64_t take_u64(reader *r, const char *what) {
    const uint8_t *at = take(r, 8, what);
    return at ? load_u64(at) : 0;
}

static gguf_text take_text(reader *r, const char *what) {
    gguf_text text = {NULL, take_u64(r, what)};
    text.at = (const char *)take(r, text.n, what);
    if (!text.at) text.n = 0;
    return text;
}

static bool take_value(reader *r, gguf_value *v) {
    v->key = take_text(r, "a key ends early");
    const uint32_t kind = take_u32(r, "a value's kind is missing");
    if (r->failed) return false;
    if (kind >= GGUF_KINDS) return damaged(r, "a value of unknown kind");
    v->kind = v->element = kinds[kind].kind;
    v->count = 1;
    if (v->kind == GGUF_ARRAY) {
        const uint32_t element = take_u32(r, "an array's kind is missing");
        v->count = take_u64(r, "an array's length is missing");
        if (r->failed) return false;
        if (element >= GGUF_KINDS) return damaged(r, "an array of unknown kind");
        if (kinds[element].kind == GGUF_ARRAY) return damaged(r, "an array of arrays");
        v->element = kinds[element].kind;
    }
    v->data = r->file->map + r->at;
    const uint64_t start = r->at;
    const uint32_t bytes = kinds[v->element].bytes;
    if (bytes) {
        if (v->count > (r->file->size - r->at) / bytes) return damaged(r, "a value ends early");
        take(r, v->count * bytes, "a value ends early");
    } else {
        for (uint64_t i = 0; i < v->count && !r->failed; i++) take_text(r, "a string ends early");
    }
    v->bytes = r->at - start;
    return !r->failed;
}

static bool take_tensor(reader *r, gguf_tensor *t, uint64_t *offset) {
    t->name = take_text(r, "a tensor's name ends early");
    const uint32_t n_dims = take_u32(r, "a tensor's shape is missing");
    if (r->failed) return false;
    if (n_dims < 1 || n_dims > 4) return damaged(r, "a tensor without 1 to 4 dims");
    t->n_dims = (int32_t)n_dims;
    uint64_t values = 1;
    for (int i = 0; i < 4; i++) {
        const uint64_t dim = i < t->n_dims ? take_u64(r, "a tensor's shape ends early") : 1;
        if (r->failed) return false;
        if (dim == 0 || dim > INT64_MAX / values) return damaged(r, "a tensor with an impossible shape");
        values *= dim;
        t->dims[i] = (int64_t)dim;
    }
    const uint32_t id = take_u32(r, "a tensor's type is missing");
    *offset = take_u64(r, "a tensor's offset is missing");
    if (r->failed) return false;
    t->type = (int32_t)id;
    t->format = dg_type_find(t->type);
    if (!t->format) return true; /* unknown size: the tensor is refused when its values are used */
    if (t->dims[0] % t->format->block) return true; /* rows are no whole number of blocks: the same */
    const uint64_t blocks = values / (uint64_t)t->format->block;
    if (blocks > INT64_MAX / (uint64_t)t->format->bytes) return damaged(r, "a tensor with an impossible size");
    t->bytes = blocks * (uint64_t)t->format->bytes;
    return true;
}

static int by_name(const void *a, const void *b) {
    const gguf_text x = ((const gguf_tensor *)a)->name, y = ((const gguf_tensor *)b)->name;
    const int order = memcmp(x.at, y.at, (size_t)(x.n < y.n ? x.n : y.n));
    return order ? order : (x.n > y.n) - (x.n < y.n);
}

static int by_place(const void *a, const void *b) {
    const gguf_tensor *x = a, *y = b;
    return (x->data > y->data) - (x->data < y->data);
}

static bool overlap(const gguf_tensor *a, const gguf_tensor *b) { return b->data < a->data + a->bytes; }
static bool same_name(const gguf_tensor *a, const gguf_tensor *b) { return by_name(a, b) == 0; }

/* Sorts tensors by an order, and fails for the first two neighbours that must not be in one file. */
static int refuse_pairs(const gguf *file, int (*order)(const void *, const void *),
                        bool (*refused)(const gguf_tensor *, const gguf_tensor *), const char *what, dg_error *error) {
    gguf_tensor *sorted = malloc((file->n_tensors + 1) * sizeof *sorted);
    if (!sorted) return fail(error, DG_ERROR_SYSTEM, "%s: no memory for the file's index", file->path);
    memcpy(sorted, file->tensors, file->n_tensors * sizeof *sorted);
    qsort(sorted, file->n_tensors, sizeof *sorted, order);
    int status = DG_OK;
    for (uint64_t i = 1; i < file->n_tensors && status == DG_OK; i++)
        if (refused(&sorted[i - 1], &sorted[i]))
            status = fail(error, DG_ERROR_FORMAT, "%s: tensor '%.*s' %s", file->path,
                          (int)(sorted[i].name.n < 200 ? sorted[i].name.n : 200), sorted[i].name.at, what);
    free(sorted);
    return status;
}

static int parse(gguf *file, dg_error *error) {
    if (file->size < 4 || memcmp(file->map, "GGUF", 4) != 0)
        return magic_fail(file->path, file->map, file->size, error);
    reader r = {.file = file, .at = 4, .error = error};
    const uint32_t version = take_u32(&r, "the header ends early");
    file->n_tensors = take_u64(&r, "the header ends early");
    file->n_values = take_u64(&r, "the header ends early");
    if (r.failed) return DG_ERROR_FORMAT;
    if (version > 0 && version << 16 == 0) /* only the upper two bytes are set: a version number in big-endian order */
        return fail(error, DG_ERROR_FORMAT, "%s: a big-endian GGUF file; this build reads little-endian ones",
                    file->path);
    if (version < 2 || version > 3)
        return fail(error, DG_ERROR_FORMAT, "%s: GGUF version %u; this build reads 2 and 3, little-endian", file->path,
                    version);
    /* The smallest size of a value and of a tensor bounds their numbers, before memory is allocated for them. */
    if (file->n_values > file->size / 13 || file->n_tensors > file->size / 32 || file->n_values > MOST_VALUES) {
        damaged(&r, "more entries claimed than the file has room for, or than there may be");
        return DG_ERROR_FORMAT;
    }
    file->values = calloc(file->n_values + 1, sizeof *file->values);
    file->tensors = calloc(file->n_tensors + 1, sizeof *file->tensors);
    uint64_t *offsets = calloc(file->n_tensors + 1, sizeof *offsets);
    if (!file->values || !file->tensors || !offsets) {
        free(offsets);
        return fail(error, DG_ERROR_SYSTEM, "%s: no memory for the file's index", file->path);
    }
    for (uint64_t i = 0; i < file->n_values && !r.failed; i++) take_value(&r, &file->values[i]);
    for (uint64_t i = 0; i < file->n_tensors && !r.failed; i++) take_tensor(&r, &file->tensors[i], &offsets[i]);
    uint64_t alignment = GGUF_ALIGNMENT;
    if (!r.failed) {
        int64_t own;
        const gguf_value *v = gguf_find(file, "general.alignment");
        if (v && (!gguf_integer(v, &own) || own < 8 || own > 1 << 20 || (own & (own - 1))))
            damaged(&r, "an alignment that is no power of two from 8 on");
        else if (v) alignment = (uint64_t)own;
    }
    const uint64_t data = (r.at + alignment - 1) / alignment * alignment;
    file->header = data < file->size ? data : file->size;
    for (uint64_t i = 0; i < file->n_tensors && !r.failed; i++) {
        gguf_tensor *t = &file->tensors[i];
        if (offsets[i] % alignment || data > file->size || offsets[i] > file->size - data ||
            t->bytes > file->size - data - offsets[i]) {
            fail(error, DG_ERROR_FORMAT,
                 "%s: truncated or damaged: tensor '%.*s' needs %llu bytes at %llu, the file has %llu", file->path,
                 (int)(t->name.n < 200 ? t->name.n : 200), t->name.at, (unsigned long long)t->bytes,
                 (unsigned long long)(data + offsets[i]), (unsigned long long)file->size);
            r.failed = true;
        } else t->data = file->map + data + offsets[i];
    }
    free(offsets);
    if (r.failed) return DG_ERROR_FORMAT;
    const int status = refuse_pairs(file, by_name, same_name, "is there twice", error);
    return status == DG_OK ? refuse_pairs(file, by_place, overlap, "begins within another's bytes", error) : status;
}

static int open_one(const char *path, gguf **out, dg_error *error) {
    *out = NULL;
    gguf *file = calloc(1, sizeof *file);
    char *copy = file ? malloc(strlen(path) + 1) : NULL;
    if (!copy) {
        free(file);
        return fail(error, DG_ERROR_SYSTEM, "%s: no memory", path);
    }
    file->path = strcpy(copy, path);
    int status = os_map(path, &file->map, &file->size, &file->identity, error);
    if (status == DG_OK) status = gguf_verdict(file, parse(file, error), error);
    if (status != DG_OK) gguf_close(file);
    else *out = file;
    return status;
}

/* ---- Split files: NAME-00001-of-00003.gguf and so on, each with its number (from 0) and their count ---- */

enum { MOST_PARTS = 99999, SUFFIX = sizeof "-00001-of-00003.gguf" - 1 };

typedef struct part_numbers {
    int64_t no, count, tensors; /* tensors: the number in all parts; -1 where the file does not say */
} part_numbers;

static int read_numbers(const gguf *file, part_numbers *out, dg_error *error) {
    const struct {
        const char *key;
        int64_t *to, most;
    } numbers[] = {
        {"split.no", &out->no, MOST_PARTS},
        {"split.count", &out->count, MOST_PARTS},
        {"split.tensors.count", &out->tensors, INT32_MAX},
    };
    *out = (part_numbers){0, 1, -1};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        const gguf_value *v = gguf_find(file, numbers[i].key);
        if (v && (!gguf_integer(v, numbers[i].to) || *numbers[i].to < 0 || *numbers[i].to > numbers[i].most))
            return fail(error, DG_ERROR_FORMAT, "%s: metadata '%s': expected a whole number of at most %lld",
                        file->path, numbers[i].key, (long long)numbers[i].most);
    }
    return DG_OK;
}

static void name_suffix(char *at, int64_t no, int64_t count) {
    snprintf(at, SUFFIX + 1, "-%05d-of-%05d.gguf", (int)(no + 1), (int)count);
}

/* Opens part `no`, and checks that it belongs to the first part. */
static int open_part(gguf *first, const part_numbers *of, char *path, int64_t no, dg_error *error) {
    name_suffix(path + strlen(path) - SUFFIX, no, of->count);
    gguf *part;
    int status = open_one(path, &part, error);
    if (status != DG_OK) return status;
    first->others[first->n_others++] = part;
    part_numbers found;
    status = read_numbers(part, &found, error);
    if (status != DG_OK) return status;
    if (found.no != no || found.count != of->count)
        return fail(error, DG_ERROR_FORMAT, "%s: this is part %lld of %lld; part %lld of %lld was expected here", path,
                    (long long)found.no + 1, (long long)found.count, (long long)no + 1, (long long)of->count);
    if (found.tensors != of->tensors)
        return fail(error, DG_ERROR_FORMAT, "%s: a part of another file than %s: of %lld tensors in all, not %lld",
                    path, first->path, (long long)found.tensors, (long long)of->tensors);
    return DG_OK;
}

/* Joins the tensors of all parts to one list. */
static int join(gguf *first, const part_numbers *of, dg_error *error) {
    uint64_t n = first->n_tensors;
    for (int32_t i = 0; i < first->n_others; i++) n += first->others[i]->n_tensors;
    if (of->tensors >= 0 && n != (uint64_t)of->tensors)
        return fail(error, DG_ERROR_FORMAT, "%s: its parts hold %llu tensors, expected %lld", first->path,
                    (unsigned long long)n, (long long)of->tensors);
    gguf_tensor *all = realloc(first->tensors, (n + 1) * sizeof *all);
    if (!all) return fail(error, DG_ERROR_SYSTEM, "%s: no memory for the file's index", first->path);
    first->tensors = all;
    for (int32_t i = 0; i < first->n_others; i++) {
        const gguf *part = first->others[i];
        memcpy(all + first->n_tensors, part->tensors, part->n_tensors * sizeof *all);
        first->n_tensors += part->n_tensors;
    }
    return refuse_pairs(first, by_name, same_name, "is in more than one part", error);
}

static int open_parts(gguf *first, dg_error *error) {
    part_numbers of;
    int status = read_numbers(first, &of, error);
    if (status != DG_OK || of.count <= 1) return status;
    const size_t length = strlen(first->path);
    char suffix[SUFFIX + 1];
    name_suffix(suffix, of.no, of.count);
    if (length <= SUFFIX || strcmp(first->path + length - SUFFIX, suffix) != 0)
        return fail(error, DG_ERROR_FORMAT, "%s: part %lld of a split file: its name must end in %s", first->path,
                    (long long)of.no + 1, suffix);
    if (of.no != 0) {
        name_suffix(suffix, 0, of.count);
        return fail(error, DG_ERROR_FORMAT, "%s: part %lld of a split file: open the first, whose name ends in %s",
                    first->path, (long long)of.no + 1, suffix);
    }
    char *path = malloc(length + 1);
    first->others = calloc((size_t)of.count, sizeof *first->others);
    if (!path || !first->others) status = fail(error, DG_ERROR_SYSTEM, "%s: no memory", first->path);
    else strcpy(path, first->path);
    for (int64_t no = 1; no < of.count && status == DG_OK; no++) status = open_part(first, &of, path, no, error);
    free(path);
    return status == DG_OK ? join(first, &of, error) : status;
}

int gguf_open(const char *path, gguf **out, dg_error *error) {
    int status = open_one(path, out, error);
    if (status != DG_OK) return status;
    status = open_parts(*out, error);
    if (status == DG_OK) return DG_OK;
    gguf_close(*out);
    *out = NULL;
    return status;
}

void gguf_close(gguf *file) {
    if (!file) return;
    for (int32_t i = 0; i < file->n_others; i++) gguf_close(file->others[i]);
    if (file->map) os_unmap(file->map, file->size);
    free(file->others);
    free(file->values);
    free(file->tensors);
    free(file->path);
    free(file);
}

int gguf_check(const gguf *file, dg_error *error) {
    int status = os_map_check(file->path, file->map, file->size, error);
    for (int32_t i = 0; i < file->n_others && status == DG_OK; i++)
        status = os_map_check(file->others[i]->path, file->others[i]->map, file->others[i]->size, error);
    return status;
}

int gguf_verdict(const gguf *file, int status, dg_error *error) {
    const int lost = gguf_check(file, error);
    return lost == DG_OK ? status : lost;
}

bool gguf_text_is(gguf_text text, const char *string) {
    return text.n == strlen(string) && (text.n == 0 || memcmp(text.at, string, text.n) == 0);
}

const gguf_value *gguf_find(const gguf *file, const char *key) {
    for (uint64_t i = 0; i < file->n_values; i++)
        if (gguf_text_is(file->values[i].key, key)) return &file->values[i];
    return NULL;
}

const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name) {
    for (uint64_t i = 0; i < file->n_tensors; i++)
        if (gguf_text_is(file->tensors[i].name, name)) return &file->tensors[i];
    return NULL;
}

static bool load_integer(gguf_kind kind, const uint8_t *at, int64_t *out) {
    switch (kind) {
    case GGUF_U8: *out = *at; return true;
    case GGUF_BOOL: *out = *at != 0; return true;
    case GGUF_I8: {
        int8_t v;
        memcpy(&v, at, 1);
        *out = v;
        return true;
    }
    case GGUF_U16: {
        uint16_t v;
        memcpy(&v, at, 2);
        *out = v;
        return true;
    }
    case GGUF_I16: {
        int16_t v;
        memcpy(&v, at, 2);
        *out = v;
        return true;
    }
    case GGUF_U32: *out = load_u32(at); return true;
    case GGUF_I32: {
        int32_t v;
        memcpy(&v, at, 4);
        *out = v;
        return true;
    }
    case GGUF_I64: memcpy(out, at, 8); return true;
    case GGUF_U64: *out = (int64_t)load_u64(at); return load_u64(at) <= INT64_MAX;
    default: return false;
    }
}

bool gguf_integer(const gguf_value *v, int64_t *out) { return v && load_integer(v->kind, v->data, out); }

bool gguf_element(const gguf_value *v, uint64_t i, int64_t *out) {
    if (!v || v->kind != GGUF_ARRAY || i >= v->count || !kinds[v->element].bytes) return false;
    return load_integer(v->element, v->data + i * kinds[v->element].bytes, out);
}

bool gguf_float(const gguf_value *v, double *out) {
    if (!v) return false;
    if (v->kind == GGUF_F32) {
        float f;
        memcpy(&f, v->data, 4);
        *out = (double)f;
        return true;
    }
    if (v->kind != GGUF_F64) return false;
    memcpy(out, v->data, 8);
    return true;
}

gguf_text gguf_next_string(const uint8_t **cursor) {
    const gguf_text text = {(const char *)*cursor + 8, load_u64(*cursor)};
    *cursor += 8 + text.n;
    return text;
}

bool gguf_string(const gguf_value *v, gguf_text *out) {
    if (!v || v->kind != GGUF_STRING) return false;
    const uint8_t *cursor = v->data;
    *out = gguf_next_string(&cursor);
    return true;
}

/* ---- The public view ---- */

int dg_file_open(const char *path, dg_file **out, dg_error *error) { return gguf_open(path, out, error); }
void dg_file_free(dg_file *file) { gguf_close(file); }
int dg_file_check(const dg_file *file, dg_error *error) { return gguf_check(file, error); }

uint64_t dg_file_bytes(const dg_file *file) {
    uint64_t bytes = file->size;
    for (int32_t i = 0; i < file->n_others; i++) bytes += file->others[i]->size;
    return bytes;
}

int32_t dg_file_parts(const dg_file *file) { return file->n_others + 1; }

bool dg_file_value_at(const dg_file *file, int32_t i, dg_file_value *out) {
    if (i < 0 || (uint64_t)i >= file->n_values) return false;
    const gguf_value *v = &file->values[i];
    *out = (dg_file_value){.key = v->key.at,
                           .key_bytes = v->key.n,
                           .kind = (int32_t)v->kind,
                           .element = (int32_t)v->element,
                           .count = v->count,
                           .data = v->data,
                           .bytes = v->bytes};
    return true;
}

bool dg_file_tensor_at(const dg_file *file, int32_t i, dg_file_tensor *out) {
    if (i < 0 || (uint64_t)i >= file->n_tensors) return false;
    const gguf_tensor *t = &file->tensors[i];
    const int64_t *d = t->dims;
    *out = (dg_file_tensor){.name = t->name.at,
                            .name_bytes = t->name.n,
                            .type = t->type,
                            .n_dims = t->n_dims,
                            .dims = {d[0], d[1], d[2], d[3]},
                            .data = t->data,
                            .bytes = t->bytes};
    return true;
}
