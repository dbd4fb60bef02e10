/* Gemma's BPE with byte fallback. Results equal those of the `tokenizers` package (see tests/test_tokenizer.py).
 *
 * The vocabulary is not copied: two hash tables point into the mapped file, and the rank of a merge is its place in the
 * file. A text is encoded in three steps: special tokens are cut out; the rest is split into runs of newlines and the
 * text between them; the characters of each are merged, in the order of a heap. */
#include "tokenizer.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "lists.h"

/* The values of token_type. */
enum kind { NORMAL = 1, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE };

#define BLANK "\xE2\x96\x81"      /* U+2581 stands for ' ' */
#define BROKEN "\xEF\xBF\xBD"     /* U+FFFD replaces bytes that are not UTF-8 */
#define NONE UINT32_MAX

/* ---- A hash table of numbers, with open addressing: callers compare what a number stands for -------------------- */

typedef struct slot {
    uint32_t hash, value; /* value NONE: the slot is empty */
} slot;

typedef struct table {
    slot *slots;
    uint32_t mask;
} table;

static bool table_new(table *t, uint64_t n) {
    uint64_t size = 16;
    while (size < 2 * n) size *= 2;
    if (size > (uint64_t)1 << 32 || size > SIZE_MAX / sizeof(slot)) return false;
    t->slots = malloc((size_t)size * sizeof(slot));
    if (t->slots == NULL) return false;
    memset(t->slots, 0xFF, (size_t)size * sizeof(slot));
    t->mask = (uint32_t)(size - 1);
    return true;
}

static uint64_t mix(uint64_t h) {
    h *= UINT64_C(0x9E3779B97F4A7C15);
    return h ^ h >> 32;
}

static uint64_t load(const char *at, size_t n) {
    uint64_t word = 0;
    memcpy(&word, at, n);
    return word;
}

static uint32_t hash_text(const char *at, size_t n) {
    uint64_t h = n + 1;
    for (; n > 8; n -= 8, at += 8) h = mix(h ^ load(at, 8));
    if (n >= 4) h = mix(h ^ (load(at, 4) | load(at + n - 4, 4) << 32));
    else if (n > 0) h = mix(h ^ (load(at, 1) | load(at + n / 2, 1) << 8 | load(at + n - 1, 1) << 16));
    return (uint32_t)(mix(h) >> 16);
}

static uint32_t hash_pair(uint32_t left, uint32_t right) {
    return (uint32_t)(mix(mix((uint64_t)left << 32 | right)) >> 16);
}

/* The most slots that a search in a half-full table may look at. By chance the longest search takes a quarter of this
 * (60 slots in Gemma's vocabulary). A vocabulary that needs more was made to be slow, and is refused. */
enum { MOST_PROBES = 256 };

/* Whether all clusters (runs of full slots) are short: a search for an absent entry goes to the end of a cluster. */
static bool short_clusters(const table *t) {
    uint32_t length = 0;
    for (uint64_t i = 0; i <= (uint64_t)t->mask + MOST_PROBES; i++) { /* a cluster may wrap around to slot 0 */
        length = t->slots[i & t->mask].value == NONE ? 0 : length + 1;
        if (length > MOST_PROBES) return false;
    }
    return true;
}

/* The most bytes of a token. It bounds the time per byte of text for files whose tokens are made to match almost. */
enum { MOST_BYTES = 1024 };

/* A node of the prefix tree of special tokens: an edge leads to it for each next byte of a token's text. */
typedef struct node {
    uint32_t parent;
    uint8_t byte; /* the byte that leads here from the parent */
    int32_t id;   /* the token that ends here, or -1 */
} node;

/* ---- The tokenizer ---------------------------------------------------------------------------------------------- */

struct dg_tokenizer {
    dg_vocab vocab;
    const gguf *file;
    gguf *owned;          /* the same, where dg_tokenizer_open opened it */
    char *chat_template;
    const uint8_t *tokens, *merges; /* the arrays' first elements, in the map */
    const gguf_value *types; /* token_type of the file */
    uint32_t *token_at;   /* [n_vocab] offset of each token in its array */
    uint8_t *kinds;       /* [n_vocab] the types that are used: see take_marks */
    table ids;            /* token text -> id */
    table ranks;          /* merge -> its offset in the file's array, which is used as its rank */
    size_t longest_token, longest_merge;
    int32_t byte_ids[256]; /* the token of each byte, or -1 */
    bool begins_special[256];
    node *nodes;          /* the prefix tree of special tokens; the first node is its root */
    uint32_t n_nodes;
    table children;       /* (node, byte) -> node */
};

static gguf_text string_at(const uint8_t *strings, uint32_t offset) {
    const uint8_t *cursor = strings + offset;
    return gguf_next_string(&cursor);
}

static gguf_text text_of(const dg_tokenizer *t, int32_t id) { return string_at(t->tokens, t->token_at[id]); }

static int32_t find_token(const dg_tokenizer *t, const char *at, size_t n, uint32_t hash) {
    for (uint32_t i = hash & t->ids.mask;; i = (i + 1) & t->ids.mask) {
        slot s = t->ids.slots[i];
        if (s.value == NONE) return -1;
        if (s.hash != hash) continue;
        gguf_text text = string_at(t->tokens, t->token_at[s.value]);
        if (text.n == n && memcmp(text.at, at, n) == 0) return (int32_t)s.value;
    }
}

static int32_t find_text(const dg_tokenizer *t, const char *at, size_t n) {
    return n > t->longest_token ? -1 : find_token(t, at, n, hash_text(at, n));
}

int32_t tokenizer_find(const dg_tokenizer *tokenizer, const char *token) {
    return find_text(tokenizer, token, strlen(token));
}

const dg_vocab *dg_tokenizer_vocab(const dg_tokenizer *tokenizer) { return &tokenizer->vocab; }
const uint8_t *dg_tokenizer_kinds(const dg_tokenizer *tokenizer) { return tokenizer->kinds; }

void dg_tokenizer_free(dg_tokenizer *tokenizer) {
    if (tokenizer == NULL) return;
    if (tokenizer->owned != NULL) gguf_close(tokenizer->owned);
    free(tokenizer->chat_template);
    free(tokenizer->token_at);
    free(tokenizer->kinds);
    free(tokenizer->ids.slots);
    free(tokenizer->ranks.slots);
    free(tokenizer->nodes);
    free(tokenizer->children.slots);
    free(tokenizer);
}

/* ---- Reading a file --------------------------------------------------------------------------------------------- */

static int no_memory(const gguf *file, dg_error *error) {
    return fail(error, DG_ERROR_SYSTEM, "%s: no memory for its tokenizer", file->path);
}

/* Finds an array with elements of this kind, and with `count` of them unless that is 0. *out is NULL for an optional
 * array that the file does not have. */
static int find_array(const gguf *file, key_id key, gguf_kind element, uint64_t count, bool required,
                      const gguf_value **out, dg_error *error) {
    const gguf_value *value = *out = gguf_find(file, key_name(key));
    if (value == NULL) return required ? fail(error, DG_ERROR_FORMAT, "%s: no %s", file->path, key_name(key)) : DG_OK;
    int64_t ignored;
    bool integers = element == GGUF_I32 && value->count > 0 && gguf_element(value, 0, &ignored);
    if (value->kind != GGUF_ARRAY || (value->count > 0 && value->element != element && !integers))
        return fail(error, DG_ERROR_FORMAT, "%s: %s is not an array of %s", file->path, key_name(key),
                    element == GGUF_STRING ? "strings"
                    : element == GGUF_F32  ? "float32"
                                           : "integers");
    if (count > 0 && value->count != count)
        return fail(error, DG_ERROR_FORMAT, "%s: %s has %llu elements, expected one for each of %llu tokens",
                    file->path, key_name(key), (unsigned long long)value->count, (unsigned long long)count);
    if (element == GGUF_STRING && value->bytes >= NONE)
        return fail(error, DG_ERROR_FORMAT, "%s: %s takes %llu bytes, more than the 4G there may be", file->path,
                    key_name(key), (unsigned long long)value->bytes);
    return DG_OK;
}

static int crafted(const gguf *file, key_id key, dg_error *error) {
    return fail(error, DG_ERROR_FORMAT, "%s: %s is made so that texts would take for ever: its hashes are alike",
                file->path, key_name(key));
}

static int read_id(const gguf *file, key_id key, int32_t n_vocab, int32_t *out, dg_error *error) {
    *out = -1;
    const gguf_value *value = gguf_find(file, key_name(key));
    if (value == NULL) return DG_OK;
    int64_t id;
    if (!gguf_integer(value, &id))
        return fail(error, DG_ERROR_FORMAT, "%s: %s is not an integer", file->path, key_name(key));
    if (id < 0 || id >= n_vocab)
        return fail(error, DG_ERROR_FORMAT, "%s: %s is %lld, expected an id below %d", file->path, key_name(key),
                    (long long)id, (int)n_vocab);
    *out = (int32_t)id;
    return DG_OK;
}

static int read_template(const gguf *file, dg_tokenizer *t, dg_error *error) {
    const gguf_value *value = gguf_find(file, key_name(KEY_chat_template));
    if (value == NULL) return DG_OK;
    gguf_text text;
    if (!gguf_string(value, &text) || memchr(text.at, 0, (size_t)text.n) != NULL)
        return fail(error, DG_ERROR_FORMAT, "%s: %s is not a text", file->path, key_name(KEY_chat_template));
    t->chat_template = malloc((size_t)text.n + 1);
    if (t->chat_template == NULL) return no_memory(file, error);
    memcpy(t->chat_template, text.at, (size_t)text.n);
    t->chat_template[text.n] = 0;
    t->vocab.chat_template = t->chat_template;
    return DG_OK;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The byte that a token "<0xXX>" stands for, or -1. */
static int byte_of(gguf_text text) {
    if (text.n != 6 || memcmp(text.at, "<0x", 3) != 0 || text.at[5] != '>') return -1;
    int high = hex_digit(text.at[3]), low = hex_digit(text.at[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

/* ---- Marks ---- */

static const struct {
    uint8_t kind, ends;
    const char *text;
} marks[] = {
#define DG_MARK(kind, ends, text) {kind, ends, text},
#include "marks.def"
#undef DG_MARK
};
enum { MARKS = sizeof marks / sizeof *marks, IF_WRITTEN = 2 };

/* Whether a token of this type is ordinary text. */
static bool text_kind(int64_t kind, gguf_text text) {
    return kind == NORMAL || kind == UNUSED || (kind == BYTE && byte_of(text) < 0);
}

/* Whether a text has the form <|name>, <name|> or <|name|>. */
static bool looks_like_mark(gguf_text text) {
    if (text.n < 4 || text.at[0] != '<' || text.at[text.n - 1] != '>') return false;
    const bool left = text.at[1] == '|', right = text.at[text.n - 2] == '|';
    const uint64_t begin = 1 + left, end = text.n - 1 - right;
    bool name = (left || right) && begin < end;
    for (uint64_t i = begin; name && i < end; i++) {
        const char c = text.at[i];
        name = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
    }
    return name;
}

/* The id of a mark, or -1 where the vocabulary has no such token, or uses it for something else. */
static int32_t find_mark(const dg_tokenizer *t, int32_t i) {
    const bool markup = strcmp(marks[i].text, "</s>") == 0 && tokenizer_find(t, "<|tool_response>") >= 0;
    return markup ? -1 : tokenizer_find(t, marks[i].text);
}

bool tokenizer_end_mark(const dg_tokenizer *t, int32_t i, int32_t *id, bool *always) {
    int64_t kind = NORMAL;
    if (i >= MARKS) return false;
    *id = marks[i].ends ? find_mark(t, i) : -1;
    const bool as_text = *id >= 0 && gguf_element(t->types, (uint64_t)*id, &kind) && text_kind(kind, text_of(t, *id));
    const bool written = t->chat_template != NULL && strstr(t->chat_template, marks[i].text) != NULL;
    *always = as_text || (*id >= 0 && marks[i].ends == IF_WRITTEN && written);
    return true;
}

/* Gives marks their types, whatever the file's types are: see marks.def. */
static void take_marks(dg_tokenizer *t) {
    for (int32_t i = 0; i < MARKS; i++) {
        const int32_t id = find_mark(t, i);
        if (id >= 0 && (marks[i].ends || text_kind(t->kinds[id], text_of(t, id)))) t->kinds[id] = marks[i].kind;
    }
    for (int32_t id = 0; id < t->vocab.n_vocab; id++) {
        const gguf_text text = text_of(t, id);
        if (text_kind(t->kinds[id], text) && looks_like_mark(text)) t->kinds[id] = CONTROL;
    }
}

/* ---- Special tokens ---- */

static bool special_kind(uint8_t kind) { return kind == CONTROL || kind == USER_DEFINED || kind == UNKNOWN; }

/* The slot of a node's child, or the empty slot for it; NULL where the search takes too long. */
static slot *child_slot(const dg_tokenizer *t, uint32_t parent, uint8_t byte) {
    const uint32_t hash = hash_pair(parent, byte);
    uint32_t probes = 0;
    for (uint32_t i = hash & t->children.mask; probes++ < MOST_PROBES; i = (i + 1) & t->children.mask) {
        slot *s = &t->children.slots[i];
        if (s->value == NONE ||
            (s->hash == hash && t->nodes[s->value].parent == parent && t->nodes[s->value].byte == byte))
            return s;
    }
    return NULL;
}

/* Builds the prefix tree of special tokens, with which all of them are found in one pass over a text. */
static int plant_specials(const gguf *file, dg_tokenizer *t, dg_error *error) {
    uint64_t bytes = 0;
    for (int32_t id = 0; id < t->vocab.n_vocab; id++)
        bytes += special_kind(t->kinds[id]) ? string_at(t->tokens, t->token_at[id]).n : 0;
    t->nodes = bytes < NONE ? malloc(((size_t)bytes + 1) * sizeof *t->nodes) : NULL;
    if (t->nodes == NULL || !table_new(&t->children, bytes)) return no_memory(file, error);
    t->nodes[t->n_nodes++] = (node){.parent = NONE, .byte = 0, .id = -1};
    for (int32_t id = 0; id < t->vocab.n_vocab; id++) {
        if (!special_kind(t->kinds[id])) continue;
        const gguf_text text = string_at(t->tokens, t->token_at[id]);
        if (text.n == 0 || find_text(t, text.at, (size_t)text.n) != id)
            continue; /* of equal texts, the first is used */
        uint32_t at = 0;
        for (uint64_t i = 0; i < text.n; i++) {
            slot *s = child_slot(t, at, (uint8_t)text.at[i]);
            if (s == NULL) return crafted(file, KEY_tokens, error);
            if (s->value == NONE) {
                *s = (slot){.hash = hash_pair(at, (uint8_t)text.at[i]), .value = t->n_nodes};
                t->nodes[t->n_nodes++] = (node){.parent = at, .byte = (uint8_t)text.at[i], .id = -1};
            }
            at = s->value;
        }
        t->nodes[at].id = id;
        t->begins_special[(uint8_t)text.at[0]] = true;
    }
    return short_clusters(&t->children) ? DG_OK : crafted(file, KEY_tokens, error);
}

/* ---- Tokens and merges ---- */

static int read_tokens(const gguf *file, dg_tokenizer *t, dg_error *error) {
    const gguf_value *tokens, *types, *scores;
    int status = find_array(file, KEY_tokens, GGUF_STRING, 0, true, &tokens, error);
    if (status != DG_OK) return status;
    if (tokens->count == 0 || tokens->count > INT32_MAX)
        return fail(error, DG_ERROR_FORMAT, "%s: %s has %llu tokens", file->path, key_name(KEY_tokens),
                    (unsigned long long)tokens->count);
    status = find_array(file, KEY_token_type, GGUF_I32, tokens->count, true, &types, error);
    if (status != DG_OK) return status;
    status = find_array(file, KEY_scores, GGUF_F32, tokens->count, false, &scores, error);
    if (status != DG_OK) return status;

    int32_t n = t->vocab.n_vocab = (int32_t)tokens->count;
    t->tokens = tokens->data;
    t->types = types;
    t->token_at = malloc((size_t)n * sizeof *t->token_at);
    t->kinds = malloc((size_t)n);
    if (t->token_at == NULL || t->kinds == NULL || !table_new(&t->ids, (uint64_t)n)) return no_memory(file, error);

    const uint8_t *cursor = t->tokens;
    for (int32_t id = 0; id < n; id++) {
        t->token_at[id] = (uint32_t)(cursor - t->tokens);
        gguf_text text = gguf_next_string(&cursor);
        if (text.n > MOST_BYTES)
            return fail(error, DG_ERROR_FORMAT, "%s: token %d has %llu bytes, more than the %d there may be",
                        file->path, (int)id, (unsigned long long)text.n, MOST_BYTES);
        if (text.n > t->longest_token) t->longest_token = (size_t)text.n;

        int64_t kind;
        if (!gguf_element(types, (uint64_t)id, &kind) || kind < NORMAL || kind > BYTE)
            return fail(error, DG_ERROR_FORMAT, "%s: %s of token %d is none of 1 to 6", file->path,
                        key_name(KEY_token_type), (int)id);
        if ((kind == NORMAL || kind == UNUSED) && byte_of(text) >= 0) kind = BYTE;
        /* Some files give the quotes of tool calls the type of control tokens, which are left out of texts. */
        if (kind == CONTROL && gguf_text_is(text, "<|\"|>")) kind = USER_DEFINED;
        t->kinds[id] = (uint8_t)kind;

        uint32_t hash = hash_text(text.at, (size_t)text.n), i = hash & t->ids.mask, probes = 0;
        for (; t->ids.slots[i].value != NONE; i = (i + 1) & t->ids.mask) {
            if (probes++ == MOST_PROBES) return crafted(file, KEY_tokens, error);
            if (t->ids.slots[i].hash != hash) continue;
            gguf_text other = string_at(t->tokens, t->token_at[t->ids.slots[i].value]);
            if (other.n == text.n && memcmp(other.at, text.at, (size_t)text.n) == 0) break;
        }
        /* The first of equal texts is used to encode. */
        if (t->ids.slots[i].value == NONE) t->ids.slots[i] = (slot){.hash = hash, .value = (uint32_t)id};
    }
    if (!short_clusters(&t->ids)) return crafted(file, KEY_tokens, error);
    take_marks(t);

    for (int byte = 0; byte < 256; byte++) {
        static const char digits[] = "0123456789ABCDEF";
        char text[6] = {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
        t->byte_ids[byte] = find_text(t, text, sizeof text);
    }
    return plant_specials(file, t, error);
}

/* A merge is "left right", cut at the first space from index 1. */
static bool cut_merge(gguf_text merge, size_t *left) {
    const char *space = merge.n < 3 ? NULL : memchr(merge.at + 1, ' ', (size_t)merge.n - 2);
    *left = space == NULL ? 0 : (size_t)(space - merge.at);
    return space != NULL;
}

static int read_merges(const gguf *file, dg_tokenizer *t, dg_error *error) {
    const gguf_value *merges;
    int status = find_array(file, KEY_merges, GGUF_STRING, 0, false, &merges, error);
    if (status != DG_OK) return status;
    uint64_t n = merges == NULL ? 0 : merges->count; /* a vocabulary of single characters has no merges */
    if (!table_new(&t->ranks, n)) return no_memory(file, error);
    if (n == 0) return DG_OK;

    const uint8_t *cursor = t->merges = merges->data;
    for (uint64_t k = 0; k < n; k++) {
        uint32_t offset = (uint32_t)(cursor - t->merges);
        gguf_text text = gguf_next_string(&cursor);
        size_t left;
        if (!cut_merge(text, &left))
            return fail(error, DG_ERROR_FORMAT, "%s: %s %llu is not two tokens with a space between them", file->path,
                        key_name(KEY_merges), (unsigned long long)k);
        if (text.n > t->longest_merge) t->longest_merge = (size_t)text.n;
        uint32_t hash = hash_pair(hash_text(text.at, left), hash_text(text.at + left + 1, (size_t)text.n - left - 1));
        uint32_t i = hash & t->ranks.mask, probes = 0;
        for (; t->ranks.slots[i].value != NONE; i = (i + 1) & t->ranks.mask) {
            if (probes++ == MOST_PROBES) return crafted(file, KEY_merges, error);
            if (t->ranks.slots[i].hash != hash) continue;
            gguf_text other = string_at(t->merges, t->ranks.slots[i].value);
            if (other.n == text.n && memcmp(other.at, text.at, (size_t)text.n) == 0) break;
        }
        t->ranks.slots[i] = (slot){.hash = hash, .value = offset}; /* of equal merges, the last one is used */
    }
    return short_clusters(&t->ranks) ? DG_OK : crafted(file, KEY_merges, error);
}

static bool asks_for_bos(const gguf *file) {
    const gguf_value *add_bos = gguf_find(file, key_name(KEY_add_bos));
    return add_bos != NULL && add_bos->kind == GGUF_BOOL && *add_bos->data != 0;
}

static int read_all(const gguf *file, dg_tokenizer *t, dg_error *error) {
    const gguf_value *model = gguf_find(file, key_name(KEY_tokenizer_model));
    gguf_text name;
    if (model == NULL || !gguf_string(model, &name))
        return fail(error, DG_ERROR_FORMAT, "%s: no %s: the file holds no vocabulary", file->path,
                    key_name(KEY_tokenizer_model));
    if (!gguf_text_is(name, "gemma4")) {
        bool plain = name.n <= 64; /* whether the text may be in a message, which has one line */
        for (uint64_t i = 0; plain && i < name.n; i++) plain = name.at[i] >= ' ' && name.at[i] <= '~';
        return fail(error, DG_ERROR_FORMAT, "%s: %s is '%.*s', expected 'gemma4'", file->path,
                    key_name(KEY_tokenizer_model), plain ? (int)name.n : 1, plain ? name.at : "?");
    }
    int status = read_tokens(file, t, error);
    if (status == DG_OK) status = read_merges(file, t, error);
    if (status == DG_OK) status = read_template(file, t, error);

    const struct {
        key_id key;
        const char *usual;
        int32_t *id;
    } ids[] = {
        {KEY_bos_id, "<bos>", &t->vocab.bos_id},    {KEY_eos_id, "<eos>", &t->vocab.eos_id},
        {KEY_unk_id, "<unk>", &t->vocab.unk_id},    {KEY_pad_id, "<pad>", &t->vocab.pad_id},
        {KEY_mask_id, "<mask>", &t->vocab.mask_id},
    };
    for (size_t i = 0; i < sizeof ids / sizeof *ids && status == DG_OK; i++) {
        status = read_id(file, ids[i].key, t->vocab.n_vocab, ids[i].id, error);
        if (*ids[i].id < 0) *ids[i].id = tokenizer_find(t, ids[i].usual); /* Gemma's, where a file lacks the key */
    }
    if (status != DG_OK) return status;

    for (int byte = 0; byte < 256 && t->vocab.unk_id < 0; byte++)
        if (t->byte_ids[byte] < 0)
            return fail(error, DG_ERROR_FORMAT, "%s: neither a token <0x%02X> nor %s for texts that need them",
                        file->path, (unsigned)byte, key_name(KEY_unk_id));
    const int32_t bos = t->vocab.bos_id;
    t->vocab.add_bos = bos >= 0 && (asks_for_bos(file) || gguf_text_is(text_of(t, bos), "<bos>"));
    return DG_OK;
}

int tokenizer_new(const gguf *file, dg_tokenizer **out, dg_error *error) {
    *out = NULL;
    dg_tokenizer *t = calloc(1, sizeof *t);
    if (t == NULL) return no_memory(file, error);
    t->file = file;
    int status = gguf_verdict(file, read_all(file, t, error), error);
    if (status == DG_OK) *out = t;
    else dg_tokenizer_free(t);
    return status;
}

int dg_tokenizer_open(const char *path, dg_tokenizer **out, dg_error *error) {
    *out = NULL;
    gguf *file;
    int status = gguf_open(path, &file, error);
    if (status != DG_OK) return status;
    status = tokenizer_new(file, out, error);
    if (status == DG_OK) (*out)->owned = file;
    else gguf_close(file);
    return status;
}

/* ---- UTF-8 ------------------------------------------------------------------------------------------------------ */

/* The bytes of the character at at[0], of n > 0 bytes. Where it is not valid UTF-8: minus the length of the longest
 * beginning of a character, which becomes one U+FFFD. */
static int utf8_next(const char *at, size_t n) {
    const uint8_t *s = (const uint8_t *)at;
    if (s[0] < 0x80) return 1;
    int length = s[0] < 0xC2 ? 0 : s[0] < 0xE0 ? 2 : s[0] < 0xF0 ? 3 : s[0] < 0xF5 ? 4 : 0;
    /* The range of the second byte excludes overlong forms, surrogates and characters above U+10FFFF. */
    uint8_t least = s[0] == 0xE0 ? 0xA0 : s[0] == 0xF0 ? 0x90 : 0x80;
    uint8_t most = s[0] == 0xED ? 0x9F : s[0] == 0xF4 ? 0x8F : 0xBF;
    for (int i = 1; i < length; i++) {
        if ((size_t)i >= n || s[i] < least || s[i] > most) return -i;
        least = 0x80;
        most = 0xBF;
    }
    return length == 0 ? -1 : length;
}

static bool utf8_valid(const char *at, size_t n) {
    for (size_t i = 0; i < n;) {
        int length = utf8_next(at + i, n - i);
        if (length < 0) return false;
        i += (size_t)length;
    }
    return true;
}

/* A copy of a text with U+FFFD in place of invalid bytes; NULL without memory. */
static char *utf8_repair(const char *at, size_t n, size_t *n_out) {
    char *copy = n > SIZE_MAX / 3 ? NULL : malloc(3 * n);
    size_t k = 0;
    for (size_t i = 0; copy != NULL && i < n;) {
        int length = utf8_next(at + i, n - i), taken = length < 0 ? -length : length;
        if (length < 0) memcpy(copy + k, BROKEN, 3);
        else memcpy(copy + k, at + i, (size_t)length);
        k += length < 0 ? 3 : (size_t)length;
        i += (size_t)taken;
    }
    *n_out = k;
    return copy;
}

/* ---- Encoding --------------------------------------------------------------------------------------------------- */

typedef struct symbol {
    uint32_t prev, next; /* the neighbours, or NONE */
    uint32_t at, n;      /* its bytes in encoder.text; n is 0 after it was merged into another */
    uint32_t hash;
    int32_t id;          /* its token; -1: a character without a token, which is never merged */
} symbol;

typedef struct candidate {
    uint32_t rank, left; /* merges are done lowest rank first; of equal ranks, the leftmost first */
    uint32_t n;          /* bytes of both symbols; where they have another number now, one was merged meanwhile */
} candidate;

typedef struct encoder {
    const dg_tokenizer *t;
    char *text;       /* the run that is encoded, with ' ' replaced */
    symbol *symbols;
    candidate *heap;
    size_t text_size, symbols_size, heap_size; /* the capacities of the arrays */
    size_t n_heap;
    int32_t *ids;
    size_t capacity, n_ids;
    bool
        after_unknown; /* whether the last id is the unknown token, which also stands for unknown characters after it */
} encoder;

/* Grows an array to at least n elements, and keeps the old ones. */
static bool grow(void *array, size_t *size, size_t n, size_t element) {
    if (n <= *size) return true;
    if (n > SIZE_MAX / element / 2) return false;
    size_t want = n + n / 2 + 64;
    void *old, *now;
    memcpy(&old, array, sizeof old);
    now = realloc(old, want * element);
    if (now == NULL) return false;
    memcpy(array, &now, sizeof now);
    *size = want;
    return true;
}

static void emit(encoder *e, int32_t id) {
    if (e->n_ids < e->capacity) e->ids[e->n_ids] = id;
    e->n_ids++;
    e->after_unknown = false;
}

static void emit_unknown(encoder *e, const char *at, size_t n) {
    bool bytes = true;
    for (size_t i = 0; i < n; i++) bytes = bytes && e->t->byte_ids[(uint8_t)at[i]] >= 0;
    for (size_t i = 0; i < n && bytes; i++) emit(e, e->t->byte_ids[(uint8_t)at[i]]);
    if (bytes) return;
    if (!e->after_unknown) emit(e, e->t->vocab.unk_id);
    e->after_unknown = true;
}

static bool goes_before(candidate a, candidate b) { return a.rank != b.rank ? a.rank < b.rank : a.left < b.left; }

static void sift_down(candidate *heap, size_t n, size_t i) {
    candidate moving = heap[i];
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && goes_before(heap[child + 1], heap[child])) child++;
        if (!goes_before(heap[child], moving)) break;
        heap[i] = heap[child];
    }
    heap[i] = moving;
}

static void sift_up(candidate *heap, size_t i) {
    candidate moving = heap[i];
    for (; i > 0 && goes_before(moving, heap[(i - 1) / 2]); i = (i - 1) / 2) heap[i] = heap[(i - 1) / 2];
    heap[i] = moving;
}

/* The rank of the merge of a symbol with the next one, or NONE. */
static uint32_t find_merge(const encoder *e, uint32_t left) {
    const dg_tokenizer *t = e->t;
    const symbol *a = &e->symbols[left];
    if (a->next == NONE || a->id < 0) return NONE;
    const symbol *b = &e->symbols[a->next];
    size_t n = (size_t)a->n + b->n;
    if (b->id < 0 || n >= t->longest_merge) return NONE;
    uint32_t hash = hash_pair(a->hash, b->hash);
    for (uint32_t i = hash & t->ranks.mask;; i = (i + 1) & t->ranks.mask) {
        slot s = t->ranks.slots[i];
        if (s.value == NONE) return NONE;
        if (s.hash != hash) continue;
        gguf_text merge = string_at(t->merges, s.value);
        if (merge.n == n + 1 && merge.at[a->n] == ' ' && memcmp(merge.at, e->text + a->at, a->n) == 0 &&
            memcmp(merge.at + a->n + 1, e->text + b->at, b->n) == 0)
            return s.value;
    }
}

static bool push_merge(encoder *e, uint32_t left) {
    uint32_t rank = find_merge(e, left);
    if (rank == NONE) return true;
    if (!grow(&e->heap, &e->heap_size, e->n_heap + 1, sizeof *e->heap)) return false;
    uint32_t n = e->symbols[left].n + e->symbols[e->symbols[left].next].n;
    e->heap[e->n_heap] = (candidate){.rank = rank, .left = left, .n = n};
    e->n_heap++;
    return true;
}

static bool merge_symbols(encoder *e) {
    while (e->n_heap > 0) {
        candidate top = e->heap[0];
        e->heap[0] = e->heap[--e->n_heap];
        if (e->n_heap > 0) sift_down(e->heap, e->n_heap, 0);

        symbol *a = &e->symbols[top.left];
        if (a->n == 0 || a->next == NONE) continue;
        symbol *b = &e->symbols[a->next];
        if (a->n + b->n != top.n) continue;
        uint32_t hash = hash_text(e->text + a->at, top.n);
        int32_t id = find_token(e->t, e->text + a->at, top.n, hash);
        if (id < 0) continue; /* the merged text is no token */
        a->n = top.n;
        a->hash = hash;
        a->id = id;
        a->next = b->next;
        b->n = 0;
        if (a->next != NONE) e->symbols[a->next].prev = top.left;

        size_t before = e->n_heap;
        if (a->prev != NONE && !push_merge(e, a->prev)) return false;
        if (e->n_heap > before) sift_up(e->heap, e->n_heap - 1);
        before = e->n_heap;
        if (!push_merge(e, top.left)) return false;
        if (e->n_heap > before) sift_up(e->heap, e->n_heap - 1);
    }
    return true;
}

/* Encodes a run of newlines, or a run without newlines. */
static bool encode_run(encoder *e, const char *at, size_t n) {
    if (at[0] == '\n') {
        int32_t id = find_text(e->t, at, n);
        if (id >= 0) return emit(e, id), true;
    }
    if (n >= NONE / 3 || !grow(&e->text, &e->text_size, 3 * n, 1) ||
        !grow(&e->symbols, &e->symbols_size, n, sizeof *e->symbols))
        return false;
    uint32_t n_symbols = 0, k = 0;
    for (size_t i = 0; i < n;) {
        const int length = utf8_next(at + i, n - i); /* below 0 after a special token that ended inside a character */
        const size_t from = (size_t)(length < 0 ? -length : length);
        size_t to = from;
        if (at[i] == ' ') memcpy(e->text + k, BLANK, to = 3);
        else memcpy(e->text + k, at + i, from);
        uint32_t hash = hash_text(e->text + k, to);
        e->symbols[n_symbols] = (symbol){.prev = n_symbols - 1,
                                         .next = n_symbols + 1,
                                         .at = k,
                                         .n = (uint32_t)to,
                                         .hash = hash,
                                         .id = find_token(e->t, e->text + k, to, hash)};
        n_symbols++;
        k += (uint32_t)to;
        i += from;
    }
    e->symbols[n_symbols - 1].next = NONE; /* and the first one's prev is NONE: 0 - 1 */

    e->n_heap = 0;
    for (uint32_t i = 0; i < n_symbols; i++)
        if (!push_merge(e, i)) return false;
    for (size_t i = e->n_heap / 2; i > 0; i--) sift_down(e->heap, e->n_heap, i - 1);
    if (!merge_symbols(e)) return false;

    for (uint32_t i = 0; i != NONE; i = e->symbols[i].next) {
        const symbol *s = &e->symbols[i];
        if (s->id >= 0) emit(e, s->id);
        else emit_unknown(e, e->text + s->at, s->n);
    }
    return true;
}

/* Encodes a text without special tokens. */
static bool encode_plain(encoder *e, const char *at, size_t n) {
    e->after_unknown = false;
    for (size_t begin = 0, end; begin < n; begin = end) {
        for (end = begin + 1; end < n && (at[end] == '\n') == (at[begin] == '\n');) end++;
        if (!encode_run(e, at + begin, end - begin)) return false;
    }
    return true;
}

/* The longest special token with which the text at[n] begins, or -1. */
static int32_t find_special(const dg_tokenizer *t, const char *at, size_t n, bool control, size_t *length) {
    int32_t found = -1;
    if (!t->begins_special[(uint8_t)at[0]]) return found;
    uint32_t here = 0;
    for (size_t i = 0; i < n; i++) {
        const slot *s = child_slot(t, here, (uint8_t)at[i]);
        if (s == NULL || s->value == NONE) break;
        here = s->value;
        const int32_t id = t->nodes[here].id;
        if (id < 0 || (!control && t->kinds[id] != USER_DEFINED)) continue;
        found = id;
        *length = i + 1;
    }
    return found;
}

static bool encode_text(encoder *e, const char *at, size_t n, bool control) {
    size_t begin = 0, length = 0;
    for (size_t i = 0; i < n;) {
        int32_t id = find_special(e->t, at + i, n - i, control, &length);
        if (id < 0) {
            i++;
            continue;
        }
        if (!encode_plain(e, at + begin, i - begin)) return false;
        emit(e, id);
        begin = i += length;
    }
    return encode_plain(e, at + begin, n - begin);
}

int dg_tokenize(const dg_tokenizer *tokenizer, const char *text, size_t n_bytes, bool special, int32_t *ids,
                size_t capacity, size_t *n_ids, dg_error *error) {
    encoder e = {.t = tokenizer, .ids = ids, .capacity = capacity};
    char *repaired = NULL;
    bool done;
    if (utf8_valid(text, n_bytes)) {
        done = encode_text(&e, text, n_bytes, special);
    } else {
        size_t n;
        repaired = utf8_repair(text, n_bytes, &n);
        done = repaired != NULL && encode_text(&e, repaired, n, special);
    }
    free(repaired);
    free(e.text);
    free(e.symbols);
    free(e.heap);
    *n_ids = done ? e.n_ids : 0;
    return done ? gguf_check(tokenizer->file, error)
                : fail(error, DG_ERROR_SYSTEM, "no memory to tokenize %zu bytes", n_bytes);
}

/* ---- Decoding --------------------------------------------------------------------------------------------------- */

typedef struct decoder {
    char *text;
    size_t capacity, n;
} decoder;

static void put(decoder *d, const char *at, size_t n) {
    size_t room = d->n < d->capacity ? d->capacity - d->n : 0;
    if (room > 0 && n > 0) memcpy(d->text + d->n, at, n < room ? n : room);
    d->n += n;
}

static void put_token(decoder *d, gguf_text token) {
    size_t n = (size_t)token.n;
    for (size_t i = 0; i < n;) {
        int length = utf8_next(token.at + i, n - i);
        if (length < 0) put(d, BROKEN, 3);
        else if (length == 3 && memcmp(token.at + i, BLANK, 3) == 0) put(d, " ", 1);
        else put(d, token.at + i, (size_t)length);
        i += (size_t)(length < 0 ? -length : length);
    }
}

/* Decodes neighbouring byte tokens: their text or, where it is not UTF-8, a U+FFFD for each, as `tokenizers` does. */
static void put_bytes(decoder *d, const char *bytes, size_t n) {
    if (utf8_valid(bytes, n)) put(d, bytes, n);
    else
        for (size_t i = 0; i < n; i++) put(d, BROKEN, 3);
}

int dg_detokenize(const dg_tokenizer *tokenizer, const int32_t *ids, size_t n_ids, bool special, char *text,
                  size_t capacity, size_t *n_bytes, dg_error *error) {
    *n_bytes = 0;
    for (size_t i = 0; i < n_ids; i++)
        if (ids[i] < 0 || ids[i] >= tokenizer->vocab.n_vocab)
            return fail(error, DG_ERROR_USAGE, "token id %d is outside the vocabulary of %d", (int)ids[i],
                        (int)tokenizer->vocab.n_vocab);
    char *bytes = malloc(n_ids + 1);
    if (bytes == NULL) return fail(error, DG_ERROR_SYSTEM, "no memory for the text of %zu tokens", n_ids);
    decoder d = {.text = text, .capacity = capacity, .n = 0};
    size_t pending = 0;
    for (size_t i = 0; i < n_ids; i++) {
        uint8_t kind = tokenizer->kinds[ids[i]];
        if ((kind == CONTROL || kind == UNKNOWN) && !special) continue;
        gguf_text token = string_at(tokenizer->tokens, tokenizer->token_at[ids[i]]);
        int byte = kind == BYTE ? byte_of(token) : -1;
        if (byte >= 0) {
            bytes[pending++] = (char)byte;
            continue;
        }
        put_bytes(&d, bytes, pending);
        pending = 0;
        put_token(&d, token);
    }
    put_bytes(&d, bytes, pending);
    free(bytes);
    *n_bytes = d.n;
    return gguf_check(tokenizer->file, error);
}
