/* The tokenizer on a small real vocabulary, and on vocabularies made here, most of them damaged. */
#include "tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "check.h"

/* ---- A file without a file: values in buffers of exactly their size, so that a read past one is found ----------- */

typedef struct made {
    gguf file;
    gguf_value values[16];
} made;

static void put(made *m, const char *key, gguf_kind kind, gguf_kind element, uint64_t count, const void *data,
                size_t bytes) {
    uint8_t *copy = malloc(bytes + (bytes == 0));
    if (bytes > 0) memcpy(copy, data, bytes);
    m->values[m->file.n_values++] = (gguf_value){{key, strlen(key)}, kind, element, count, copy, bytes};
}

static void put_strings(made *m, const char *key, gguf_kind kind, uint64_t count, const char *const *strings) {
    uint8_t buffer[8192];
    size_t at = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t n = strlen(strings[i]);
        memcpy(buffer + at, &n, 8);
        memcpy(buffer + at + 8, strings[i], n);
        at += 8 + n;
    }
    put(m, key, kind, GGUF_STRING, count, buffer, at);
}

static const char *const tokens[] = {"<pad>", "<eos>", "<bos>", "<unk>",        "a",     "b",
                                     "ab",    "\n",    "\n\n",  "\xE2\x96\x81", "<|\"|>"};
static const int32_t types[] = {3, 3, 3, 2, 1, 1, 1, 1, 1, 1, 3};
static const char *const merges[] = {"a b", "a b"};
enum { N = sizeof tokens / sizeof *tokens };

static made *make(void) {
    made *m = calloc(1, sizeof *m);
    m->file.path = (char *)(uintptr_t)"made.gguf";
    m->file.values = m->values;
    const char *model = "gemma4";
    put_strings(m, "tokenizer.ggml.model", GGUF_STRING, 1, &model);
    put_strings(m, "tokenizer.ggml.tokens", GGUF_ARRAY, N, tokens);
    float scores[N] = {0};
    put(m, "tokenizer.ggml.scores", GGUF_ARRAY, GGUF_F32, N, scores, sizeof scores);
    put(m, "tokenizer.ggml.token_type", GGUF_ARRAY, GGUF_I32, N, types, sizeof types);
    put_strings(m, "tokenizer.ggml.merges", GGUF_ARRAY, 2, merges);
    uint32_t unk = 3;
    put(m, "tokenizer.ggml.unknown_token_id", GGUF_U32, GGUF_U32, 1, &unk, sizeof unk);
    return m;
}

enum { MODEL, TOKENS, SCORES, TYPES, MERGES, UNK };

/* Another text of as many bytes. */
static void rename_token(made *m, int id, const char *text) {
    uint8_t *at = (uint8_t *)(uintptr_t)m->values[TOKENS].data;
    for (int i = 0; i < id; i++) at += 8 + strlen(tokens[i]);
    memcpy(at + 8, text, strlen(text));
}

static void drop(made *m) {
    for (uint64_t i = 0; i < m->file.n_values; i++) free((void *)(uintptr_t)m->values[i].data);
    free(m);
}

/* The made file must be refused with a message that names it and `what`, in one line. */
static void refused(made *m, const char *what) {
    dg_error error = {0};
    dg_tokenizer *t = NULL;
    CHECK(tokenizer_new(&m->file, &t, &error) == DG_ERROR_FORMAT, "%s", what);
    CHECK(t == NULL, "%s", what);
    CHECK(strncmp(error.message, "made.gguf: ", 11) == 0, "%s", error.message);
    CHECK(strstr(error.message, what) != NULL, "%s: %s", what, error.message);
    CHECK(strchr(error.message, '\n') == NULL, "%s", error.message);
    dg_tokenizer_free(t);
    drop(m);
}

static void takes(const dg_tokenizer *t, const char *text, bool special, size_t n, const int32_t *expected) {
    int32_t ids[64];
    size_t n_ids = 0;
    CHECK(dg_tokenize(t, text, strlen(text), special, ids, 64, &n_ids, NULL) == DG_OK, "%s", text);
    CHECK(n_ids == n && memcmp(ids, expected, n_ids * sizeof *ids) == 0, "\"%s\": %zu ids", text, n_ids);
}

#define TAKES(t, text, special, ...) \
    takes(t, text, special, sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t), (const int32_t[]){__VA_ARGS__})

static void gives(const dg_tokenizer *t, const char *expected, bool special, size_t n, const int32_t *ids) {
    char text[256];
    size_t n_bytes = 0;
    CHECK(dg_detokenize(t, ids, n, special, text, sizeof text, &n_bytes, NULL) == DG_OK, "%s", expected);
    CHECK(n_bytes == strlen(expected) && memcmp(text, expected, n_bytes) == 0, "\"%s\", not \"%.*s\"", expected,
          (int)n_bytes, text);
}

#define GIVES(t, text, special, ...) \
    gives(t, text, special, sizeof((int32_t[]){__VA_ARGS__}) / sizeof(int32_t), (const int32_t[]){__VA_ARGS__})

static void test_made(void) {
    made *m = make();
    dg_error error = {0};
    dg_tokenizer *t = NULL;
    CHECK(tokenizer_new(&m->file, &t, &error) == DG_OK, "%s", error.message);
    if (t == NULL) return;
    const dg_vocab *v = dg_tokenizer_vocab(t);
    CHECK(v->n_vocab == N && v->unk_id == 3 && v->mask_id == -1, "vocab");
    CHECK(v->bos_id == 2 && v->eos_id == 1 && v->pad_id == 0 && v->add_bos, "ids that no key names, by their texts");
    CHECK(v->chat_template == NULL, "template");
    CHECK(tokenizer_find(t, "ab") == 6 && tokenizer_find(t, "abc") == -1 && tokenizer_find(t, "") == -1, "find");

    TAKES(t, "abba", true, 6, 5, 4);
    TAKES(t, "a b", true, 4, 9, 5);
    TAKES(t, "\n\n\nab\n\n", true, 7, 7, 7, 6, 8);       /* three newlines are no token, and no merge joins them */
    TAKES(t, "xyz", true, 3);                            /* unknown neighbours are one <unk> */
    TAKES(t, "xaxx\nx", true, 3, 4, 3, 7, 3);
    TAKES(t, "x<bos>x", true, 3, 2, 3);
    TAKES(t, "x<unk>x", true, 3, 3, 3);
    TAKES(t, "a<bos>b", false, 4, 3, 5, 3, 5);           /* "<", b, "os>", b */
    TAKES(t, "a<|\"|>b", false, 4, 10, 5);               /* marked CONTROL, yet never left out */
    TAKES(t, "a\xFF\xE2\x96z", true, 4, 3);
    GIVES(t, "a b", false, 2, 4, 9, 0, 5);
    GIVES(t, "<bos>a<unk><|\"|>", true, 2, 4, 3, 10);
    GIVES(t, "a<|\"|>", false, 2, 4, 3, 10);

    size_t n = 7;
    CHECK(dg_tokenize(t, NULL, 0, true, NULL, 0, &n, &error) == DG_OK && n == 0, "empty");
    CHECK(dg_detokenize(t, NULL, 0, true, NULL, 0, &n, &error) == DG_OK && n == 0, "empty");
    int32_t few[3] = {-7, -7, -7};
    CHECK(dg_tokenize(t, "abaab", 5, true, few, 2, &n, &error) == DG_OK && n == 3, "%zu", n);
    CHECK(few[0] == 6 && few[1] == 4 && few[2] == -7, "nothing is written past the capacity");
    char text[4] = "####";
    CHECK(dg_detokenize(t, (int32_t[]){6, 6}, 2, true, text, 3, &n, &error) == DG_OK && n == 4, "%zu", n);
    CHECK(memcmp(text, "aba#", 4) == 0, "nothing is written past the capacity");
    CHECK(dg_detokenize(t, (int32_t[]){N}, 1, true, text, 3, &n, &error) == DG_ERROR_USAGE, "id past the end");
    CHECK(dg_detokenize(t, (int32_t[]){-1}, 1, true, text, 3, &n, &error) == DG_ERROR_USAGE, "id below 0");
    dg_tokenizer_free(t);
    dg_tokenizer_free(NULL);
    drop(m);
}

static void test_damaged(void) {
    made *m;
    static const char *const short_merges[] = {"a b", "ab"}, *const no_right[] = {"ab "}, *const no_left[] = {" b"};
    static const char *const odd[] = {"llama\nx"};
    (m = make())->values[MODEL].key.n--, refused(m, "no tokenizer.ggml.model");
    (m = make())->values[MODEL].kind = GGUF_U64, refused(m, "no tokenizer.ggml.model");
    (m = make())->values[MODEL].key.n--, put_strings(m, "tokenizer.ggml.model", GGUF_STRING, 1, odd);
    refused(m, "expected 'gemma4'");
    (m = make())->values[TOKENS].key.n--, refused(m, "no tokenizer.ggml.tokens");
    (m = make())->values[TOKENS].count = 0, refused(m, "has 0 tokens");
    (m = make())->values[TOKENS].count--, refused(m, "expected one for each of 10 tokens");
    (m = make())->values[TOKENS].element = GGUF_U64, refused(m, "tokenizer.ggml.tokens is not an array of strings");
    (m = make())->values[TOKENS].kind = GGUF_STRING, refused(m, "tokenizer.ggml.tokens is not an array of strings");
    (m = make())->values[TYPES].key.n--, refused(m, "no tokenizer.ggml.token_type");
    (m = make())->values[TYPES].count--, refused(m, "token_type has 10 elements");
    (m = make())->values[TYPES].element = GGUF_F32, refused(m, "token_type is not an array of integers");
    (m = make())->values[SCORES].count--, refused(m, "scores has 10 elements");
    (m = make())->values[SCORES].element = GGUF_I32, refused(m, "scores is not an array of float32");
    (m = make())->values[MERGES].element = GGUF_I32, refused(m, "merges is not an array of strings");
    (m = make())->values[UNK].kind = GGUF_F32, refused(m, "unknown_token_id is not an integer");
    m = make(), m->values[UNK].key.n--, rename_token(m, 3, "<Unk>"), refused(m, "neither a token <0x00> nor");

    m = make();
    memcpy((uint8_t *)(uintptr_t)m->values[TYPES].data + 8, (int32_t[]){7}, 4);
    refused(m, "token_type of token 2 is none of 1 to 6");
    m = make();
    memcpy((uint8_t *)(uintptr_t)m->values[UNK].data, (int32_t[]){N}, 4);
    refused(m, "unknown_token_id is 11, expected an id below 11");
    const char *const *bad[] = {short_merges, no_right, no_left};
    for (int i = 0; i < 3; i++) {
        m = make();
        m->values[MERGES].key.n--;
        put_strings(m, "tokenizer.ggml.merges", GGUF_ARRAY, i == 0 ? 2 : 1, bad[i]);
        refused(m, i == 0 ? "merges 1 is not two tokens" : "merges 0 is not two tokens");
    }
    m = make();
    put(m, "tokenizer.chat_template", GGUF_STRING, GGUF_STRING, 1, "\3\0\0\0\0\0\0\0a\0b", 11);
    refused(m, "chat_template is not a text");
}

/* What hash_text's last step made x of. */
static uint64_t unmixed(uint64_t x) {
    const uint64_t odd = UINT64_C(0x9E3779B97F4A7C15);
    uint64_t inverse = odd;
    for (int i = 0; i < 6; i++) inverse *= 2 - odd * inverse;
    return (x ^ x >> 32) * inverse;
}

/* Of 8 bytes, with this hash: bits 16 to 47 of what is unmixed; 9 is what hash_text begins with. */
static uint64_t text_with(uint32_t hash, uint64_t other) {
    return unmixed(unmixed(other << 48 | (uint64_t)hash << 16)) ^ 9;
}

enum { CRAFTED = 1500 };

static void put_crafted(made *m, const char *key, const uint64_t *strings, uint64_t n) {
    put(m, key, GGUF_ARRAY, GGUF_STRING, n, strings, n * 16);
}

/* Tokens of 8 bytes whose hashes are alike: with one hash, reading them would take the square of their number; with
 * hashes that follow each other each is read at once, but a search for what is absent passes all of them. */
static void test_crafted(void) {
    uint64_t *strings = malloc(CRAFTED * 2 * sizeof *strings);
    int32_t *kinds = malloc(CRAFTED * sizeof *kinds);
    for (int way = 0; way < 3; way++) {
        for (uint32_t i = 0; i < CRAFTED; i++) {
            strings[2 * i] = 8;
            const uint32_t first =
                way == 1 ? 0 : UINT32_MAX - CRAFTED / 2; /* the second row goes round the table's end */
            strings[2 * i + 1] = way == 0 ? text_with(777, i) : text_with(first + i, 0);
            kinds[i] = 1;
        }
        made *m = make();
        for (int i = TOKENS; i <= TYPES; i++) m->values[i].key.n--;
        put_crafted(m, "tokenizer.ggml.tokens", strings, CRAFTED);
        put(m, "tokenizer.ggml.token_type", GGUF_ARRAY, GGUF_I32, CRAFTED, kinds, CRAFTED * sizeof *kinds);
        refused(m, "its hashes are alike");
    }
    free(strings), free(kinds);
}

/* Odd, but harmless. */
static void test_odd(void) {
    static const char *const own[] = {"", "<sot>", "a", "a", "b", "<0x0a>", "\xFFz", "\xE2\x96\x81", "c", "abab"};
    static const int32_t kinds[] = {4, 3, 1, 1, 1, 1, 1, 1, 1, 4};
    static const char *const joins[] = {"a b", "b b", "x y", "c  c", "b a"};
    made *m = make();
    for (int i = TOKENS; i <= MERGES; i++) m->values[i].key.n--;
    put_strings(m, "tokenizer.ggml.tokens", GGUF_ARRAY, 10, own);
    put(m, "tokenizer.ggml.token_type", GGUF_ARRAY, GGUF_I32, 10, kinds, sizeof kinds);
    put_strings(m, "tokenizer.ggml.merges", GGUF_ARRAY, 5, joins);
    put(m, "tokenizer.ggml.add_bos_token", GGUF_BOOL, GGUF_BOOL, 1, "\1", 1);
    dg_error error = {0};
    dg_tokenizer *t = NULL;
    CHECK(tokenizer_new(&m->file, &t, &error) == DG_OK, "%s", error.message);
    if (t != NULL) {
        CHECK(!dg_tokenizer_vocab(t)->add_bos, "no bos id to add");
        TAKES(t, "ab", true, 2, 4);          /* a merge into what is no token; of two equal tokens the first */
        TAKES(t, "cc b", true, 8, 8, 7, 4);
        TAKES(t, "ababab", true, 9, 2, 4);
        GIVES(t, "\xEF\xBF\xBDz", true, 6);  /* a token that is not UTF-8 */
        GIVES(t, "\n", true, 5, 0);
        dg_tokenizer_free(t);
    }
    drop(m);
}

/* Marks are marks whatever a file calls them, and text that merely looks alike is text. */
static void test_marks(void) {
    static const char *const own[] = {
        "<unk>", "<turn|>", "<|tool_response>", "<|turn>", "<|channel>", "</s>", "<|>", "<a|b>", "<b>", "s", "|",
        "<",     ">"};
    enum { OWN = sizeof own / sizeof *own };
    int32_t kinds[OWN] = {2, 1, 4, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    made *m = make();
    for (int i = TOKENS; i <= MERGES; i++) m->values[i].key.n--;
    put_strings(m, "tokenizer.ggml.tokens", GGUF_ARRAY, OWN, own);
    put(m, "tokenizer.ggml.token_type", GGUF_ARRAY, GGUF_I32, OWN, kinds, sizeof kinds);
    memcpy((uint8_t *)(uintptr_t)m->values[UNK].data, (int32_t[]){0}, 4);
    dg_error error = {0};
    dg_tokenizer *t = NULL;
    CHECK(tokenizer_new(&m->file, &t, &error) == DG_OK, "%s", error.message);
    if (t != NULL) {
        static const uint8_t taken[OWN] = {2, 3, 3, 3, 4, 1, 1, 1, 1, 1, 1, 1, 1};
        CHECK(memcmp(dg_tokenizer_kinds(t), taken, OWN) == 0, "kinds");
        TAKES(t, "s<turn|>s", true, 9, 1, 9);
        TAKES(t, "<|tool_response><|turn><|channel>", true, 2, 3, 4);
        TAKES(t, "<|channel><|turn>", false, 4, 11, 10, 0, 12); /* of these two, the channel's mark is always one */
        TAKES(t, "<|>", true, 11, 10, 12);
        GIVES(t, "s<|channel></s>", false, 9, 1, 2, 3, 4, 5);
        int32_t id, ends = 0;
        bool always;
        for (int32_t i = 0; tokenizer_end_mark(t, i, &id, &always); i++) {
            ends += id >= 0;
            CHECK(id < 0 || (id == 1 && always) || (id == 2 && !always), "an answer ends at %d", id);
        }
        CHECK(ends == 2, "%d marks end an answer", ends);
        dg_tokenizer_free(t);
    }
    drop(m);
}

/* A small real vocabulary: long runs go through the heap, and everything comes back. */
static void test_tiny(void) {
    dg_error error = {0};
    dg_tokenizer *t = NULL;
    CHECK(dg_tokenizer_open("tests/models/no-such-file.gguf", &t, &error) == DG_ERROR_SYSTEM && t == NULL, "no file");
    CHECK(dg_tokenizer_open("tests/models/tiny-bpe/tiny-bpe.gguf", &t, &error) == DG_OK, "%s", error.message);
    if (t == NULL) return;
    CHECK(dg_tokenizer_vocab(t)->bos_id == 2 && dg_tokenizer_vocab(t)->add_bos, "bos");
    CHECK(dg_tokenizer_vocab(t)->chat_template != NULL, "template");
    enum { LONG = 20000 };
    char *text = malloc(LONG), *back = malloc(LONG);
    int32_t *ids = malloc(LONG * sizeof *ids);
    static const char *const alphabets[] = {
        "a", "\n", " ", "the \n", "etaoin shrdlu<>|\"\t\r\x01", "ab\xC3\xA9\xF0\x9F\x98\x80 "};
    for (size_t k = 0; k < sizeof alphabets / sizeof *alphabets; k++) {
        size_t n_letters = strlen(alphabets[k]), n_ids = 0, n_bytes = 0;
        uint32_t state = 1;
        for (size_t i = 0; i < LONG; i++) {
            state = state * 1664525u + 1013904223u;
            text[i] = k < 5 ? alphabets[k][(state >> 16) % n_letters] : alphabets[k][i % n_letters];
        }
        size_t n = LONG - (k == 5 ? LONG % n_letters : 0);
        CHECK(dg_tokenize(t, text, n, true, ids, LONG, &n_ids, &error) == DG_OK && n_ids <= n, "%s", alphabets[k]);
        CHECK(dg_detokenize(t, ids, n_ids, true, back, LONG, &n_bytes, &error) == DG_OK, "%s", alphabets[k]);
        CHECK(n_bytes == n && memcmp(text, back, n) == 0, "\"%s\" does not come back", alphabets[k]);
    }
    free(text);
    free(back);
    free(ids);
    dg_tokenizer_free(t);
}

int main(void) {
    test_made();
    test_damaged();
    test_crafted();
    test_odd();
    test_marks();
    test_tiny();
    return check_done("tokenizer");
}
