/* The generator on the bundled model: starts with pins, canvases of several lengths, rules of the caller's. */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "dg.h"

static dg_error error;

static uint32_t state = 1;
static int32_t below(int32_t n) {
    state = state * 1664525u + 1013904223u;
    return (int32_t)(state >> 8) % n;
}

static bool pins_hold(const dg_event *e, const dg_start *start) {
    for (int32_t i = 0; i < e->n; i++)
        if (start->pinned[e->place + i] &&
            (e->canvas[i] != start->ids[e->place + i] || e->entropy[i] != 0.0f || !e->accepted[i]))
            return false;
    return true;
}

/* Every third step keeps nothing, by the caller's rule. */
static void test_start(dg_session *s, const dg_sampling *o, int32_t n, int32_t share) {
    int32_t *ids = malloc((size_t)n * sizeof *ids), prompt[3] = {2, 8, 9}, fixed = 0, kept = 0;
    bool *pinned = malloc((size_t)n * sizeof *pinned), none[96] = {false};
    for (int32_t i = 0; i < n; i++) {
        pinned[i] = below(100) < share;
        ids[i] = pinned[i] ? below(64) : -1;
        fixed += pinned[i];
    }
    const dg_start start = {ids, pinned, n};
    dg_generator *g;
    dg_session_rewind(s, 0, &error);
    dg_encode(s, prompt, 3, DG_LOGITS_NONE, NULL, &error);
    CHECK(dg_generator_fill(s, o, &start, &g, &error) == DG_OK, "%s", error.message);
    CHECK(dg_generator_accept(g, none, &error) == DG_ERROR_USAGE, "there is no step to accept anything of");
    int32_t steps = 0, told = 0, block = 0;
    for (dg_event e = {0}; e.kind != DG_EVENT_DONE;) {
        CHECK(dg_generator_next(g, &e, &error) == DG_OK, "%s", error.message);
        if (e.kind == DG_EVENT_DONE) break;
        const bool grows = e.block != block || e.n_final >= told;
        CHECK(grows && (e.n_final == 0 || e.final), "%d ids of canvas %d are final, after %d", e.n_final, e.block,
              told);
        told = e.n_final, block = e.block;
        if (e.kind != DG_EVENT_STEP) continue;
        if (++steps % 3 == 0) CHECK(dg_generator_accept(g, none, &error) == DG_OK, "%s", error.message);
        CHECK(pins_hold(&e, &start), "%d tokens, %d %% of them pinned: canvas %d step %d", n, share, e.block, e.index);
    }
    const dg_result *r = dg_generator_result(g);
    for (int32_t i = 0; i < r->n_ids; i++) {
        const int32_t place = r->places[i];
        CHECK(place >= 0 && place < n && (i == 0 || place > r->places[i - 1]), "place %d of token %d", place, i);
        if (pinned[place]) kept += r->ids[i] == ids[place];
    }
    CHECK(kept == fixed, "%d of %d pins in the result", kept, fixed);
    CHECK((steps == 0) == (fixed == n), "%d steps", steps);
    dg_generator_free(g);
    free(ids), free(pinned);
}

/* What each makes alone, made together: starts of other lengths, one without. */
static void test_together(dg_model *m, const dg_sampling *o) {
    enum { COUNT = 3, MOST = 130 };
    const int32_t lengths[COUNT] = {130, 20, 0};
    int32_t ids[MOST], prompt[3] = {2, 8, 9}, want[COUNT][MOST], n_want[COUNT];
    bool pinned[MOST];
    for (int32_t i = 0; i < MOST; i++) pinned[i] = i % 3 == 0, ids[i] = 7 + i % 11;
    for (int together = 0; together < 2; together++) {
        dg_session *s[COUNT];
        dg_generator *g[COUNT];
        dg_event events[COUNT] = {{0}};
        for (int32_t i = 0; i < COUNT; i++) {
            const dg_start start = {ids, pinned, lengths[i]};
            dg_session_new(m, 300, &s[i], &error);
            dg_encode(s[i], prompt, 3, DG_LOGITS_NONE, NULL, &error);
            CHECK(dg_generator_fill(s[i], o, lengths[i] ? &start : NULL, &g[i], &error) == DG_OK, "%s", error.message);
            while (!together && events[i].kind != DG_EVENT_DONE) dg_generator_next(g[i], &events[i], &error);
        }
        while (events[0].kind != DG_EVENT_DONE || events[1].kind != DG_EVENT_DONE || events[2].kind != DG_EVENT_DONE)
            CHECK(dg_generators_next(g, COUNT, events, &error) == DG_OK, "%s", error.message);
        for (int32_t i = 0; i < COUNT; i++) {
            const dg_result *r = dg_generator_result(g[i]);
            if (together)
                CHECK(r->n_ids == n_want[i] && memcmp(r->ids, want[i], sizeof(int32_t) * (size_t)r->n_ids) == 0,
                      "generator %d", i);
            n_want[i] = r->n_ids;
            memcpy(want[i], r->ids, sizeof(int32_t) * (size_t)r->n_ids);
            dg_generator_free(g[i]);
            dg_session_free(s[i]);
        }
    }
}

static void test_refusals(dg_session *s, const dg_sampling *o) {
    const int32_t ids[2] = {64, -5};
    const bool pinned[2] = {true, false};
    dg_generator *g;
    CHECK(dg_generator_fill(s, o, &(dg_start){ids, pinned, 0}, &g, &error) == DG_ERROR_USAGE, "no tokens");
    CHECK(dg_generator_fill(s, o, &(dg_start){ids, pinned, 2}, &g, &error) == DG_ERROR_USAGE &&
              strstr(error.message, "64 at position 0"),
          "%s", error.message);
    CHECK(dg_generator_fill(s, o, &(dg_start){ids + 1, pinned + 1, 1}, &g, &error) == DG_OK,
          "ids in holes are not read");
    dg_generator_free(g);
}

static bool stop_now(void *asked) {
    ++*(int *)asked;
    return true;
}

/* A stopped call leaves the session as it was, and a generator goes on as if nothing had been. */
static void test_stop(dg_model *m, const dg_sampling *o) {
    int32_t prompt[200], length = 3, asked = 0;
    for (int32_t i = 0; i < 200; i++) prompt[i] = 1 + below(63);
    dg_session *s[2];
    dg_generator *g[2];
    dg_event e[2] = {{0}, {0}};
    for (int i = 0; i < 2; i++) {
        dg_session_new(m, 300, &s[i], &error);
        dg_encode(s[i], prompt, length, DG_LOGITS_NONE, NULL, &error);
    }
    dg_session_stop(s[0], true);
    CHECK(dg_encode(s[0], prompt, 200, DG_LOGITS_NONE, NULL, &error) == DG_ERROR_STOPPED, "%s", error.message);
    CHECK(dg_session_length(s[0]) == length, "%d tokens", dg_session_length(s[0]));
    dg_session_stop(s[0], false);
    dg_session_ask(s[0], stop_now, &asked);
    int status = DG_OK;
    for (int i = 0; i < 1000 && status == DG_OK; i++) { /* nobody is asked before some time has passed */
        dg_session_rewind(s[0], length, &error);
        status = dg_encode(s[0], prompt, 200, DG_LOGITS_NONE, NULL, &error);
    }
    CHECK(status == DG_ERROR_STOPPED && asked == 1, "status %d, asked %d times", status, asked);
    CHECK(dg_session_length(s[0]) == length, "%d tokens", dg_session_length(s[0]));
    dg_session_ask(s[0], NULL, NULL);
    for (int i = 0; i < 2; i++) CHECK(dg_generator_new(s[i], o, &g[i], &error) == DG_OK, "%s", error.message);
    for (int step = 0; e[1].kind != DG_EVENT_DONE; step++) {
        dg_session_stop(s[0], true);
        status = dg_generator_next(g[0], &e[0], &error);
        dg_session_stop(s[0], false);
        if (status == DG_ERROR_STOPPED) status = dg_generator_next(g[0], &e[0], &error);
        else CHECK(e[0].kind != DG_EVENT_STEP, "step %d was not stopped", step);
        CHECK(status == DG_OK && dg_generator_next(g[1], &e[1], &error) == DG_OK, "%s", error.message);
        CHECK(e[0].kind == e[1].kind, "event %d", step);
        if (e[0].kind == DG_EVENT_STEP)
            CHECK(!memcmp(e[0].next, e[1].next, sizeof(int32_t) * (size_t)e[0].n), "step %d differs", step);
    }
    dg_generator *both[2] = {NULL, NULL};
    for (int i = 0; i < 2; i++) {
        dg_generator_free(g[i]);
        dg_session_rewind(s[i], length, &error);
        dg_generator_new(s[i], o, &both[i], &error);
    }
    dg_session_stop(s[0], true);
    CHECK(dg_generators_next(both, 2, e, &error) == DG_OK, "one of two does not stop both: %s", error.message);
    dg_session_stop(s[1], true);
    CHECK(dg_generators_next(both, 2, e, &error) == DG_ERROR_STOPPED, "all are to stop");
    for (int i = 0; i < 2; i++) {
        dg_generator_free(both[i]);
        dg_session_free(s[i]);
    }
}

int main(void) {
    dg_model *m;
    dg_session *s;
    dg_sampling o;
    if (dg_model_open("runtime/dgemma/models/sudoku-q8_0.gguf", NULL, &m, &error) != DG_OK)
        return puts(error.message), 1;
    dg_session_new(m, 300, &s, &error);
    dg_sampling_default(m, &o);
    o.steps = 3;
    const int32_t lengths[6] = {1, 5, 96, 97, 200, 40}, shares[6] = {50, 100, 30, 70, 5, 0};
    for (int i = 0; i < 6; i++) {
        o.pins_conditioned = i % 2;
        o.settled = o.plateau = i % 3 == 0;
        o.commit = i % 3 ? 10.0f : 0.0f;
        test_start(s, &o, lengths[i], shares[i]);
    }
    test_refusals(s, &o);
    o.steps = 2, o.short_canvas = 1, o.max_tokens = 120, o.retries = 1;
    test_together(m, &o);
    test_stop(m, &o);
    dg_session_free(s);
    dg_model_free(m);
    return check_done("generate");
}
