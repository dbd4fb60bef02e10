#define _GNU_SOURCE
/* Texts and ids through a real vocabulary: what goes in comes back, and nothing is written past what there is room for.
 * And vocabularies that are GGUF files (a text may follow behind PART): they are refused, or take any text and their
 * own ids. */
#include "files.h"
#include "tokenizer.h"

enum { MOST_TEXT = 512 }; /* of a run: many short texts find more than few long ones */

static dg_tokenizer *tokenizer;

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t n, size_t room, unsigned seed) {
    return n > 4 && memcmp(data, "GGUF", 4) == 0 ? mutate_file(data, n, room, seed) : LLVMFuzzerMutate(data, n, room);
}

/* ---- A real vocabulary ---- */

/* The text of ids, which the caller frees, in a buffer of exactly its size; *n: its bytes. */
static char *text_of(const int32_t *ids, size_t n_ids, bool special, size_t *n) {
    size_t again;
    MUST(dg_detokenize(tokenizer, ids, n_ids, special, NULL, 0, n, NULL) == DG_OK, "ids of the vocabulary are refused");
    char *text = malloc(*n ? *n : 1);
    MUST(dg_detokenize(tokenizer, ids, n_ids, special, text, *n, &again, NULL) == DG_OK && again == *n,
         "%zu bytes, and then %zu", *n, again);
    return text;
}

static int32_t *ids_of(const char *text, size_t n_bytes, bool special, size_t *n) {
    size_t again;
    MUST(dg_tokenize(tokenizer, text, n_bytes, special, NULL, 0, n, NULL) == DG_OK, "a text is refused");
    MUST(*n <= 3 * n_bytes, "%zu tokens of %zu bytes", *n, n_bytes); /* a byte that is no UTF-8 becomes three */
    int32_t *ids = malloc((*n ? *n : 1) * sizeof *ids);
    MUST(dg_tokenize(tokenizer, text, n_bytes, special, ids, *n, &again, NULL) == DG_OK && again == *n,
         "%zu ids, and then %zu", *n, again);
    return ids;
}

static bool plain(const char *text, size_t n) {
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)text[i] >= 0x80) return false;
    return true;
}

static void check_text(const char *text, size_t n, bool special) {
    size_t n_ids, n_back, n_again;
    int32_t *ids = ids_of(text, n, special, &n_ids);
    char *back = text_of(ids, n_ids, true, &n_back);
    if (plain(text, n)) MUST(n_back == n && memcmp(back, text, n) == 0, "a text of ASCII does not come back");
    free(ids);
    ids = ids_of(back, n_back, special, &n_ids); /* what is no UTF-8 is replaced once */
    char *again = text_of(ids, n_ids, true, &n_again);
    MUST(n_again == n_back && memcmp(again, back, n_back) == 0, "what came back does not come back");
    free(ids), free(back), free(again);
}

static void check_ids(const uint8_t *data, size_t n, bool special) {
    const int32_t n_vocab = dg_tokenizer_vocab(tokenizer)->n_vocab;
    int32_t *ids = malloc((n / 2 + 1) * sizeof *ids);
    for (size_t i = 0; i < n / 2; i++) ids[i] = (data[2 * i] | data[2 * i + 1] << 8) % n_vocab;
    size_t n_text;
    char *text = text_of(ids, n / 2, special, &n_text);
    check_text(text, n_text, special);
    free(ids), free(text);
}

static void use_real(const uint8_t *data, size_t n) {
    dg_error error;
    if (!tokenizer)
        MUST(dg_tokenizer_open("tests/models/tiny-bpe/tiny-bpe.gguf", &tokenizer, &error) == DG_OK, "%s",
             error.message);
    const bool special = data[0] & 1;
    if (n > MOST_TEXT) n = MOST_TEXT;
    if (data[0] & 2) check_ids(data + 1, n - 1, special);
    else check_text((const char *)data + 1, n - 1, special);
}

/* ---- A vocabulary of any bytes ---- */

static const char sample[] = "a b<bos>\n\n\xC3\xA9\xF0\x9F\x98\x80\xFF<|\"|>ab  <0x0A>";

typedef struct passage {
    const char *at;
    size_t n;
} passage;

typedef struct trial {
    const char *path;
    passage texts[2];
} trial;

static int use_text(const dg_tokenizer *t, passage in, bool special, dg_error *error) {
    int32_t ids[256];
    char out[512];
    size_t n, n_bytes;
    const int32_t n_vocab = dg_tokenizer_vocab(t)->n_vocab;
    int status = dg_tokenize(t, in.at, in.n, special, ids, 256, &n, error);
    for (size_t i = 0; status == DG_OK && i < n && i < 256; i++)
        MUST(ids[i] >= 0 && ids[i] < n_vocab, "id %d of %d", ids[i], n_vocab);
    for (int32_t id = 0; id < n_vocab && id < 256; id++) ids[id] = id;
    if (status == DG_OK)
        status =
            dg_detokenize(t, ids, (size_t)(n_vocab < 256 ? n_vocab : 256), special, out, sizeof out, &n_bytes, error);
    return status;
}

static int use_any(const void *arg, dg_error *error) {
    const trial *of = arg;
    dg_tokenizer *t;
    int status = dg_tokenizer_open(of->path, &t, error);
    if (status != DG_OK) return status;
    for (int i = 0; i < 4 && status == DG_OK; i++) status = use_text(t, of->texts[i / 2], i % 2, error);
    const int32_t beyond = dg_tokenizer_vocab(t)->n_vocab;
    dg_error refusal = {0};
    size_t n;
    int32_t end;
    bool always;
    for (int32_t i = 0; tokenizer_end_mark(t, i, &end, &always); i++)
        MUST(end >= -1 && end < beyond, "an answer ends at %d of %d", end, beyond);
    MUST(dg_detokenize(t, &beyond, 1, true, NULL, 0, &n, &refusal) == DG_ERROR_USAGE, "id %d", beyond);
    dg_tokenizer_free(t);
    return status;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    if (n == 0) return 0;
    if (n < 4 || memcmp(data, "GGUF", 4) != 0) return use_real(data, n), 0;
    const parts p = parts_of(data, n);
    const size_t n_text = p.count > 1 ? p.n[1] : 0;
    const trial arg = {file_of(data, p.n[0]),
                       {{sample, sizeof sample - 1},
                        {(const char *)data + p.at[p.count > 1], n_text < MOST_TEXT ? n_text : MOST_TEXT}}};
    try_twice(use_any, &arg, data, n);
    return 0;
}
