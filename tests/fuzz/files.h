/* Inputs that are GGUF files, or the parts of a split one with PART between them: how they get where a path can name
 * them, what the system may refuse meanwhile, and a mutator that knows how they are built. Behind #define _GNU_SOURCE.
 */
#ifndef FILES_H
#define FILES_H

#include <string.h>
#include <unistd.h>

#include "dg.h"
#include "fuzz.h"
#include "refused.h"

enum { MOST_PARTS_HERE = 3 };
static const char PART[8] = "\n[part]\n";

typedef struct parts {
    size_t at[MOST_PARTS_HERE], n[MOST_PARTS_HERE];
    int count;
} parts;

static parts parts_of(const uint8_t *data, size_t n) {
    parts p = {.count = 1, .n = {n}};
    for (size_t i = 0; i + sizeof PART <= n && p.count < MOST_PARTS_HERE; i++)
        if (memcmp(data + i, PART, sizeof PART) == 0) {
            p.n[p.count - 1] = i - p.at[p.count - 1];
            p.at[p.count] = i + sizeof PART;
            p.n[p.count] = n - p.at[p.count];
            p.count++;
            i += sizeof PART - 1;
        }
    return p;
}

static char fuzz_folder[64];

/* The path of part `no` of so many. */
static const char *part_path(int no, int count) {
    static char path[128];
    snprintf(path, sizeof path, "%s/fuzz-%05d-of-%05d.gguf", fuzz_folder, no + 1, count);
    return path;
}

static void drop_files(void) {
    for (int count = 1; count <= MOST_PARTS_HERE; count++)
        for (int no = 0; no < count; no++) unlink(part_path(no, count));
    rmdir(fuzz_folder);
}

/* Writes the parts, an empty one not at all; the path of the first. */
static const char *file_of(const uint8_t *data, size_t n) {
    const char *const folders[] = {"/dev/shm",
                                   "/tmp"}; /* memory, where there is such a folder: it is written at each run */
    for (int i = 0; i < 2 && !fuzz_folder[0]; i++) {
        snprintf(fuzz_folder, sizeof fuzz_folder, "%s/dgemma-fuzz-XXXXXX", folders[i]);
        if (mkdtemp(fuzz_folder)) atexit(drop_files);
        else fuzz_folder[0] = 0;
    }
    const parts p = parts_of(data, n);
    for (int no = 0; no < p.count; no++) {
        const char *path = part_path(no, p.count);
        if (no && !p.n[no]) {
            unlink(path);
            continue;
        }
        FILE *f = fopen(path, "wb");
        MUST(f && fwrite(data + p.at[no], 1, p.n[no], f) == p.n[no] && fclose(f) == 0, "cannot write %s", path);
    }
    return part_path(0, p.count);
}

/* A refusal has one line that says why, whatever the file holds. */
static void check_refusal(int status, const dg_error *error) {
    MUST(status == error->status, "status %d", status);
    MUST(error->message[0], "no message");
    for (const char *c = error->message; *c; c++)
        MUST((unsigned char)*c >= ' ' && *c != 127, "a message of more than a line: %s", error->message);
}

/* What a target tries: it may fail, with an error, and keeps nothing. */
typedef int (*attempt)(const void *arg, dg_error *error);

/* Runs an attempt as it is, and once more with one of its requests of the system refused: which one, the bytes say. */
static int try_twice(attempt run, const void *arg, const uint8_t *data, size_t n) {
    unsigned which = 0;
    for (size_t i = 0; i < n; i++) which = which * 31 + data[i];
    dg_error error = {0};
    atomic_store(&asked, 0);
    const int status = run(arg, &error), requests = atomic_load(&asked), before = held();
    if (status != DG_OK) check_refusal(status, &error);
    if (requests == 0) return status;
    atomic_store(&asked, 0);
    atomic_store(&spared, false);
    atomic_store(&fails_at, 1 + (int)(which % (unsigned)requests));
    const int again = run(arg, &error), at = atomic_exchange(&fails_at, 0);
    MUST(held() == before, "request %d of %d is refused: %d things are kept", at, requests, held() - before);
    if (again != DG_OK) check_refusal(again, &error);
    if (atomic_load(&asked) < at || atomic_load(&spared))
        MUST(again == status, "status %d, and then %d", status, again);
    else
        MUST(again == DG_ERROR_SYSTEM || again == DG_ERROR_MEMORY, "request %d of %d is refused: status %d", at,
             requests, again);
    return status;
}

/* ---- A file's entries, as far as they make sense ---- */

enum { MOST_FIELDS = 4096, MOST_ENTRIES = 512 };

typedef struct field { /* a number in the header */
    size_t at, bytes;
} field;

typedef struct layout {
    field fields[MOST_FIELDS];
    size_t entries[MOST_ENTRIES + 1]; /* where each value and then each tensor begins, and where the last one ends */
    size_t n_fields, n_entries, n_values, header;
} layout;

typedef struct walker {
    const uint8_t *data;
    size_t n, at;
    layout *to;
    bool failed;
} walker;

static uint64_t number(walker *w, size_t bytes) {
    uint64_t v = 0;
    if (w->failed || bytes > w->n - w->at) return w->failed = true, 0;
    memcpy(&v, w->data + w->at, bytes);
    if (w->to->n_fields < MOST_FIELDS) w->to->fields[w->to->n_fields++] = (field){w->at, bytes};
    w->at += bytes;
    return v;
}

static void text(walker *w) {
    const uint64_t n = number(w, 8);
    if (w->failed || n > w->n - w->at) w->failed = true;
    else w->at += (size_t)n;
}

static void walk_value(walker *w, uint64_t kind, int depth) {
    static const size_t bytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (kind > 12 || depth > 3) w->failed = true;
    else if (kind == 8) text(w);
    else if (kind == 9) {
        const uint64_t element = number(w, 4), count = number(w, 8);
        for (uint64_t i = 0; i < count && !w->failed; i++) walk_value(w, element, depth + 1);
    } else number(w, bytes[kind]);
}

static void walk(const uint8_t *data, size_t n, layout *to) {
    walker w = {data, n, 8, to, n < 24};
    *to = (layout){.header = 24};
    const uint64_t n_tensors = number(&w, 8), n_values = number(&w, 8);
    for (uint64_t i = 0; !w.failed && i < n_values + n_tensors && to->n_entries < MOST_ENTRIES; i++) {
        to->entries[to->n_entries] = w.at;
        text(&w);
        if (i < n_values) walk_value(&w, number(&w, 4), 0);
        else {
            const uint64_t dims = number(&w, 4);
            for (uint64_t k = 0; k < dims && k < 8; k++) number(&w, 8);
            number(&w, 4), number(&w, 8);
        }
        if (w.failed) break;
        to->n_entries++;
        to->n_values += i < n_values;
        to->entries[to->n_entries] = to->header = w.at;
    }
}

/* ---- The mutator ---- */

static unsigned dice_state;
static size_t dice(size_t n) {
    dice_state = dice_state * 1664525u + 1013904223u;
    return n ? (dice_state >> 4) % n : 0;
}

static uint64_t odd_number(const uint8_t *data, size_t n, const layout *l, uint64_t old) {
    static const uint64_t odd[] = {0,
                                   1,
                                   2,
                                   3,
                                   7,
                                   31,
                                   255,
                                   1024,
                                   4096,
                                   65535,
                                   65536,
                                   1 << 24,
                                   INT32_MAX,
                                   UINT32_MAX,
                                   UINT64_C(1) << 32,
                                   INT64_MAX,
                                   UINT64_C(1) << 63,
                                   UINT64_MAX,
                                   UINT64_MAX - 31};
    uint64_t v = 0;
    switch (dice(6)) {
    case 0: return odd[dice(sizeof odd / sizeof *odd)];
    case 1: return old + 1 - 2 * (uint64_t)dice(2);
    case 2: return old ^ UINT64_C(1) << dice(64);
    case 3: return n - dice(64);
    case 4: { /* one that is elsewhere in the file */
        const field f = l->fields[dice(l->n_fields)];
        memcpy(&v, data + f.at, f.bytes);
        return v;
    }
    default: return old * (2 + dice(7));
    }
}

/* An entry goes, or comes twice; the count says so, and the tensors' bytes stay aligned. */
static size_t mutate_entries(uint8_t *data, size_t n, size_t room, const layout *l) {
    const size_t i = dice(l->n_entries), begin = l->entries[i], bytes = l->entries[i + 1] - begin;
    const bool twice = dice(2) == 0;
    const size_t header = twice ? l->header + bytes : l->header - bytes, from = (l->header + 31) / 32 * 32,
                 to = (header + 31) / 32 * 32;
    const size_t body = from < n ? n - from : 0;
    if (to + body > room) return n;
    if (to > from) memmove(data + to, data + from, body);
    if (twice) memmove(data + begin + bytes, data + begin, l->header - begin);
    else memmove(data + begin, data + begin + bytes, l->header - begin - bytes);
    if (to < from) memmove(data + to, data + from, body);
    memset(data + header, 0, to - header);
    uint64_t count;
    uint8_t *at = data + (i < l->n_values ? 16 : 8);
    memcpy(&count, at, 8);
    count += twice ? 1 : UINT64_MAX;
    memcpy(at, &count, 8);
    return to + body;
}

static size_t mutate_part(uint8_t *data, size_t n, size_t room) {
    static layout l;
    walk(data, n, &l);
    const size_t what = dice(20);
    if (what < 10 && l.n_fields) {
        const field f = l.fields[dice(l.n_fields)];
        uint64_t v = 0;
        memcpy(&v, data + f.at, f.bytes);
        v = odd_number(data, n, &l, v);
        memcpy(data + f.at, &v, f.bytes);
        return n;
    }
    if (what < 12 && l.n_entries) return mutate_entries(data, n, room, &l);
    if (what < 14 && n > 24) { /* bytes of a name, a text or a tensor */
        const size_t at = dice(n), most = n - at < 32 ? n - at : 32;
        LLVMFuzzerMutate(data + at, most, most);
        return n;
    }
    if (what < 16 && l.header < n) { /* a float in a tensor */
        static const uint32_t odd[] = {0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF,
                                       0,          0x80000000, 0x00000001, 0xC0000000};
        const size_t at = (l.header + dice(n - l.header)) / 4 * 4;
        if (at + 4 <= n) memcpy(data + at, &odd[dice(sizeof odd / sizeof *odd)], 4);
        return n;
    }
    if (what == 16 && n > 32) return n - dice(n - 24);
    n = LLVMFuzzerMutate(data, n, room);
    if (n >= 8) memcpy(data, "GGUF\3\0\0", 8);
    return n;
}

/* One of the parts is mutated, or there is one part more or less. */
static size_t mutate_file(uint8_t *data, size_t n, size_t room, unsigned seed) {
    static uint8_t part[1 << 20];
    dice_state = seed;
    const parts p = parts_of(data, n);
    const int no = (int)dice((size_t)p.count), what = (int)dice(32);
    const size_t at = p.at[no], bytes = p.n[no], end = at + bytes;
    if (what == 0 && p.count < MOST_PARTS_HERE && n + sizeof PART + bytes <= room) { /* the same again */
        memcpy(data + n, PART, sizeof PART);
        memmove(data + n + sizeof PART, data + at, bytes);
        return n + sizeof PART + bytes;
    }
    if (what == 1 && no) { /* without it */
        memmove(data + at - sizeof PART, data + end, n - end);
        return n - bytes - sizeof PART;
    }
    const size_t others = n - bytes, most = room - others < sizeof part ? room - others : sizeof part;
    if (bytes > most) return n;
    memcpy(part, data + at, bytes);
    const size_t now = mutate_part(part, bytes, most);
    memmove(data + at + now, data + end, n - end);
    memcpy(data + at, part, now);
    return others + now;
}

#endif
