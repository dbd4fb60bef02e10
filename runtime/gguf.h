/* GGUF files: mapped read-only, parsed once, every length checked against the file before it is used.
 * A split file is opened by its first part, which has the metadata; the tensors of all parts are then in one list. */
#ifndef DG_GGUF_H
#define DG_GGUF_H

#include "os.h"

typedef enum gguf_kind {
    GGUF_U8,
    GGUF_I8,
    GGUF_U16,
    GGUF_I16,
    GGUF_U32,
    GGUF_I32,
    GGUF_F32,
    GGUF_BOOL,
    GGUF_STRING,
    GGUF_ARRAY,
    GGUF_U64,
    GGUF_I64,
    GGUF_F64,
    GGUF_KINDS
} gguf_kind;

typedef struct gguf_text { /* without a null byte at its end */
    const char *at;
    uint64_t n;
} gguf_text;

typedef struct gguf_value {
    gguf_text key;
    gguf_kind kind;        /* GGUF_ARRAY: an array of `element` */
    gguf_kind element;
    uint64_t count;        /* the number of elements of an array; 1 for other values */
    const uint8_t *data;   /* the value or the first element, unaligned, little-endian */
    uint64_t bytes;        /* the bytes of all elements in the file */
} gguf_value;

typedef struct gguf_tensor {
    gguf_text name;
    int32_t type;          /* its number in the file */
    const dg_format *format; /* NULL: the type is unknown; without decode: this build does not read the type */
    int32_t n_dims;
    int64_t dims[4];       /* fastest first; unused ones are 1 */
    const uint8_t *data;
    uint64_t bytes;        /* 0 where the type is unknown */
} gguf_tensor;

typedef struct gguf {
    char *path;
    const uint8_t *map;
    uint64_t size;
    uint64_t header;       /* bytes before the first tensor's */
    os_identity identity;
    uint64_t n_values, n_tensors;
    gguf_value *values;
    gguf_tensor *tensors;
    struct gguf **others;  /* [n_others] the other parts of a split file; their tensors are in the list above */
    int32_t n_others;
} gguf;

/* Opens a file, and all other parts where it is the first of a split one. */
int gguf_open(const char *path, gguf **out, dg_error *error);
void gguf_close(gguf *file);
/* Fails with DG_ERROR_SYSTEM where the file, or a part of it, shrank or could not be read since it was opened: the data
 * that was read may then be zeros. */
int gguf_check(const gguf *file, dg_error *error);
/* Does the same after a function that read the file returned `status`: zeros may have caused any error. */
int gguf_verdict(const gguf *file, int status, dg_error *error);

/* The value of this key, or NULL. */
const gguf_value *gguf_find(const gguf *file, const char *key);
const gguf_tensor *gguf_find_tensor(const gguf *file, const char *name);
bool gguf_text_is(gguf_text text, const char *string);

/* Scalars as numbers: false where the value is of another kind (any integer width is accepted for integers). */
bool gguf_integer(const gguf_value *value, int64_t *out);
bool gguf_float(const gguf_value *value, double *out);
/* Element i of an array of integers or booleans. */
bool gguf_element(const gguf_value *value, uint64_t i, int64_t *out);
/* Strings: calls of next walk an array of strings from a cursor that starts at value->data. */
bool gguf_string(const gguf_value *value, gguf_text *out);
gguf_text gguf_next_string(const uint8_t **cursor);

#endif
