/* Texts and ids through a real vocabulary: what goes in comes back, and nothing is written past what there is room for. */
#include <string.h>

#include "dg.h"
#include "fuzz.h"

static dg_tokenizer *tokenizer;

/* The text of ids, which the caller frees, in a buffer of exactly its size; *n: its bytes. */
static char *text_of(const int32_t *ids, size_t n_ids, bool special, size_t *n) {
    size_t again;
    MUST(dg_detokenize(tokenizer, ids, n_ids, special, NULL, 0, n, NULL) == DG_OK, "ids of the vocabulary are refused");
    char *text = malloc(*n ? *n : 1);
    MUST(dg_detokenize(tokenizer, ids, n_ids, special, text, *n, &again, NULL) == DG_OK && again == *n, "%zu bytes, and then %zu", *n, again);
    return text;
}

static int32_t *ids_of(const char *text, size_t n_bytes, bool special, size_t *n) {
    size_t again;
    MUST(dg_tokenize(tokenizer, text, n_bytes, special, NULL, 0, n, NULL) == DG_OK, "a text is refused");
    MUST(*n <= 3 * n_bytes, "%zu tokens of %zu bytes", *n, n_bytes); /* a byte that is no UTF-8 becomes three */
    int32_t *ids = malloc((*n ? *n : 1) * sizeof *ids);
    MUST(dg_tokenize(tokenizer, text, n_bytes, special, ids, *n, &again, NULL) == DG_OK && again == *n, "%zu ids, and then %zu", *n, again);
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

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    dg_error error;
    if (!tokenizer) MUST(dg_tokenizer_open("tests/models/tiny-bpe/tiny-bpe.gguf", &tokenizer, &error) == DG_OK, "%s", error.message);
    if (n == 0) return 0;
    const bool special = data[0] & 1;
    if (data[0] & 2) check_ids(data + 1, n - 1, special);
    else check_text((const char *)data + 1, n - 1, special);
    return 0;
}
