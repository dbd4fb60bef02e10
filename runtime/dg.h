/* dgemma: block diffusion with DiffusionGemma, in C.
 *
 *     dg_error e;  dg_model *m;  dg_session *s;  dg_result *r;  dg_sampling o;
 *     if (dg_model_open("model.gguf", NULL, &m, &e)) { puts(e.message); return 1; }
 *     dg_session_new(m, 0, &s, &e);  dg_sampling_default(m, &o);
 *     dg_encode(s, ids, n_ids, DG_LOGITS_NONE, NULL, &e);
 *     dg_generate(s, &o, NULL, NULL, &r, &e);     // r->ids[0 .. r->n_ids) is the answer
 *     dg_result_free(r);  dg_session_free(s);  dg_model_free(m);
 *
 * Every function that can fail returns a dg_status, 0 being success, and then writes a message to *error.
 * Token ids are int32, logits float32, sizes in bytes; arrays are row-major and the caller's unless it is said
 * otherwise.
 * A model may be shared by threads; a session belongs to one thread at a time.
 * A process may fork at any time, whatever its threads are doing. The child may open models, and go on with those that
 * it finds open, with threads of its own, and with sessions and generators that no other thread was using at the fork;
 * those it may free. A model on a GPU is refused there with DG_ERROR_BACKEND.
 */
#ifndef DG_H
#define DG_H

#ifndef DG_CFFI
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#endif
#include "formats.h"

typedef enum dg_status {
    DG_OK = 0,
    DG_ERROR_USAGE,    /* an argument that makes no sense, or does not fit the model */
    DG_ERROR_FORMAT,   /* a file that is damaged, of another kind, or not understood */
    DG_ERROR_SYSTEM,   /* the operating system refused: no such file, no memory, a read error */
    DG_ERROR_MEMORY,   /* a memory budget that cannot be kept */
    DG_ERROR_BACKEND,  /* a backend that does not exist here or failed */
    DG_ERROR_STOPPED,  /* the caller stopped it */
    DG_ERROR_NUMBERS   /* NaN or infinity came up; the message names the layer and what was computed */
} dg_status;

typedef struct dg_error {
    int32_t status;
    char message[1020]; /* one line, UTF-8: what, where, what was expected and what was found */
} dg_error;

typedef struct dg_model dg_model;
typedef struct dg_session dg_session;
typedef struct dg_tokenizer dg_tokenizer;

/* The version of this library, such as "0.1.0". */
const char *dg_version(void);

/* ---- Configuration ------------------------------------------------------------------------------------------- */

enum { DG_MAX_LAYERS = 256, DG_MAX_END_IDS = 16 };

#define DG_MEMBER_U32 int32_t
#define DG_MEMBER_I32 int32_t
#define DG_MEMBER_F32 float
#define DG_MEMBER_BOOL int32_t
#define DG_MEMBER_U64 uint64_t
#define DG_MEMBER_SAMPLER int32_t

/* The numbers of metadata.def (its comments give each key), and what follows from the file. */
typedef struct dg_config {
#define DG_REQUIRED_KEY(kind, field, key) DG_MEMBER_##kind field;
#define DG_KEY(kind, field, key, absent) DG_MEMBER_##kind field;
#define DG_LAYER_KEY(kind, field, key) int32_t field[DG_MAX_LAYERS];
#include "metadata.def"
    int32_t n_vocab;
    int32_t n_end_ids;
    int32_t end_ids[DG_MAX_END_IDS];
} dg_config;

/* One line of metadata.def. */
typedef struct dg_key {
    const char *field; /* its name in dg_config and in the converter */
    const char *key;   /* its name in a GGUF file */
    const char *kind;  /* "U32", "STRINGS", ... */
    bool in_config;    /* a member of dg_config */
    bool per_layer;    /* one value per layer */
    bool required;     /* a file without it is refused */
    double absent;     /* else its value where a file lacks it */
} dg_key;
const dg_key *dg_key_at(int32_t i); /* NULL past the end */

/* One line of limits.def: what a file may claim. */
typedef struct dg_limit {
    const char *field; /* of dg_config */
    const char *named; /* the field of the dg_key that tells it */
    int64_t least, most;
} dg_limit;
const dg_limit *dg_limit_at(int32_t i); /* NULL past the end */

/* One line of tensors.def. */
typedef struct dg_tensor_entry {
    const char *scope; /* "TOP", "LAYER", "SLIDING", "SPLIT" */
    const char *kind;  /* "FLOATS", "MATRIX", "TABLE", "MADE" */
    const char *field;
    const char *gguf;    /* name in GGUF files, %d for the layer */
    const char *hf;      /* name in checkpoints, or "" */
} dg_tensor_entry;
const dg_tensor_entry *dg_tensor_entry_at(int32_t i); /* NULL past the end */
/* The name in GGUF files of an output head of its own. Here the embedding is the head, under either name. */
const char *dg_head_name(void);
/* Dims of entry i in this layer, fastest first, unused ones 1; returns how many there are, 0 where the layer has
 * none. */
int32_t dg_tensor_dims(int32_t i, const dg_config *config, int32_t layer, int64_t dims[3]);

/* One line of options.def. */
typedef struct dg_option {
    const char *name;
    const char *kind; /* "I32", "F32", "U64", "BOOL", "SAMPLER" */
    double least, most;
    const char *help;
} dg_option;
const dg_option *dg_option_at(int32_t i); /* NULL past the end */

/* One line of samplers.def. Its number is what the option `sampler` holds: DG_SAMPLER_ENTROPY_BOUND, ... */
enum {
#define DG_SAMPLER(ID, name, temperature, accept, stop, help) DG_SAMPLER_##ID,
#include "samplers.def"
#undef DG_SAMPLER
    DG_SAMPLER_COUNT
};
typedef struct dg_sampler {
    const char *name, *help;
} dg_sampler;
const dg_sampler *dg_sampler_at(int32_t i); /* NULL past the end */

/* One line of efforts.def. */
typedef struct dg_effort {
    const char *name, *help;
    const char *sets; /* the options that it sets, each with a space behind it */
} dg_effort;
const dg_effort *dg_effort_at(int32_t i); /* NULL past the end */

/* ---- Models --------------------------------------------------------------------------------------------------- */

enum { DG_RAM_AUTO = -1 };

typedef struct dg_model_options {
    const char *backend; /* a name of dg_backend_name, or "auto"; NULL: "auto" */
    int32_t threads;     /* 0: one per processor that this process may use */
    bool exact;          /* float32 throughout: activations are never rounded to fewer bits */
    /* bytes to spend on copies of experts, as many as they hold, that are faster to read; 0: none */
    int64_t repack;
    /* most bytes of memory that the process may hold, experts that do not fit being read again by every pass; 0: all
     * weights are mapped, and the system keeps what it can. DG_RAM_AUTO: a budget where the file is larger than the
     * memory that is free, of what is free less dg_plan_margin; else, and on a device, none. Arrays of the caller's
     * that came later are not counted. A number of bytes does not go together with repack */
    int64_t ram;
    /* most bytes of a device's memory, driver and kernels included; experts that do not fit are copied there by every
     * pass, or computed by the CPU meanwhile. 0: what is free, less a margin */
    int64_t vram;
    int32_t layers;      /* for measuring: run through the first so many layers alone; 0: all */
    /* how far self-conditioning may be off for speed, as a part of its length, where a bound of it is known; 0: 0.001.
     * Negative: it is never left to a bound. Of no effect where exact */
    float tolerance;
    /* take a file that has the embedding under both names, unread under the second: the caller compares */
    bool head_copy;
} dg_model_options;

/* Maps a GGUF file, checks every tensor, and makes it ready to run. options may be NULL. DG_ERROR_MEMORY where `ram`
 * is too little, with the least that would do for a session of DG_PLAN_CONTEXT tokens, or more than is free and what
 * this process holds. */
int dg_model_open(const char *path, const dg_model_options *options, dg_model **out, dg_error *error);
void dg_model_free(dg_model *model);
const dg_config *dg_model_config(const dg_model *model);
const dg_tokenizer *dg_model_tokenizer(const dg_model *model);
/* What runs it, such as "cpu (avx2)", and with how many threads. */
const char *dg_model_backend(const dg_model *model);
int32_t dg_model_threads(const dg_model *model);
/* The i-th backend of this build, best first, or NULL past the end. */
const char *dg_backend_name(int32_t i);
/* Whether the i-th works in memory of its own: then a budget of it, dg_model_options' vram, can be asked for. */
bool dg_backend_has_vram(int32_t i);

/* Tokens that each expert was chosen for since the model was opened: counts[n_layer][n_expert]. */
void dg_model_routing(const dg_model *model, int64_t *counts);
/* Under a budget experts with more tokens stay in memory first, from the next pass on; on a device, whose experts
 * stay where the first session finds them, only before that. tokens[n_layer][n_expert], such as dg_model_routing
 * gave them earlier. */
void dg_model_prefer(dg_model *model, const int64_t *tokens);

/* A model's budget of RAM, and what there was to decide by when it was opened. Bytes; all 0 on a device. */
typedef struct dg_ram {
    int64_t budget; /* 0: none, the file is mapped */
    int64_t needs; /* weights and a session of DG_PLAN_CONTEXT tokens: what the map takes */
    int64_t free; /* dg_memory_free then */
    int64_t least; /* of a budget */
} dg_ram;
void dg_model_ram(const dg_model *model, dg_ram *out);

/* What a model under a budget has moved since it was opened. Bytes. */
typedef struct dg_traffic {
    int64_t passes; /* through the layers, of steps and of stretches of prompts */
    int64_t read; /* from the file */
    int64_t copied; /* of that through the page cache, where the file system has no direct reads */
    int64_t resident; /* weights that are in memory now, to stay */
    int64_t ring; /* of the buffers that the others come through */
    int64_t experts; /* of all experts in the file */
    int64_t streamed; /* of those that do not stay: what a pass reads that uses them all */
    double reading; /* seconds that reads took */
    double waited; /* seconds that passes waited for them */
} dg_traffic;
/* False without a budget. */
bool dg_model_traffic(const dg_model *model, dg_traffic *out);

/* What passes on a device took, where copies to it, the GPU and the CPU work at the same time. Seconds of each. */
typedef struct dg_overlap {
    int64_t passes;
    int64_t copied; /* bytes of experts */
    double wall; /* from a pass's beginning to its end */
    double copying; /* copies were under way */
    double gpu; /* the GPU computed: wall, less what it waited for the others */
    double cpu; /* the CPU computed experts */
} dg_overlap;
/* Watches passes from here on, or no longer; those that are watched are not recorded into graphs. False where there
 * is no device, and before a first session. */
bool dg_overlap_watch(dg_model *model, bool watch);
/* Of the passes watched so far. */
bool dg_overlap_read(const dg_model *model, dg_overlap *out);

/* A device's peak rates, measured now, in bytes per second: of reading its memory, and of copying page-locked memory
 * to it. */
typedef struct dg_device_rates {
    double memory, copies;
} dg_device_rates;
/* Takes a sixteenth of the memory that is free, up to 1 GiB, and gives it back. False where there is no device. */
bool dg_device_measure(const dg_model *model, dg_device_rates *out);

/* ---- Files: what a GGUF file holds, of whatever model ----------------------------------------------------------- */

typedef struct gguf dg_file;

/* Maps a file and checks every length in it. The first part of a split file stands for all of them. */
int dg_file_open(const char *path, dg_file **out, dg_error *error);
void dg_file_free(dg_file *file);
/* Returns DG_ERROR_SYSTEM if the file became shorter while it was mapped: the lost bytes read as zeros. Models and
 * tokenizers check their files in their own calls. (The library handles SIGBUS while files are mapped, and passes on
 * any other.) */
int dg_file_check(const dg_file *file, dg_error *error);
/* Reads the configuration of a model's file; the types of its tensors do not matter. DG_ERROR_FORMAT for what is
 * no model. */
int dg_file_config(const dg_file *file, dg_config *out, dg_error *error);
uint64_t dg_file_bytes(const dg_file *file); /* all parts together */
int32_t dg_file_parts(const dg_file *file);

/* A key and its value as the file has them. Pointers are into the map; text is UTF-8 and not terminated. */
typedef struct dg_file_value {
    const char *key;
    uint64_t key_bytes;
    int32_t kind; /* GGUF's number of it: 0 U8, 4 U32, 5 I32, 6 F32, 7 BOOL, 8 STRING, 9 ARRAY, ... */
    int32_t element; /* of an array; otherwise kind */
    uint64_t count; /* of an array; otherwise 1 */
    const uint8_t *data; /* the value, or the first element; strings are a u64 length and so many bytes */
    uint64_t bytes;
} dg_file_value;
/* The i-th; false past the end. */
bool dg_file_value_at(const dg_file *file, int32_t i, dg_file_value *out);

typedef struct dg_file_tensor {
    const char *name;
    uint64_t name_bytes;
    int32_t type; /* number of its format: see dg_type_find */
    int32_t n_dims;
    int64_t dims[4]; /* fastest first; unused ones are 1 */
    const uint8_t *data;
    uint64_t bytes; /* 0 where nobody knows the type, or its rows are no whole number of blocks */
} dg_file_tensor;
bool dg_file_tensor_at(const dg_file *file, int32_t i, dg_file_tensor *out);

/* ---- Text ----------------------------------------------------------------------------------------------------- */

/* Opens the tokenizer of a GGUF file, which may hold a vocabulary alone. */
int dg_tokenizer_open(const char *path, dg_tokenizer **out, dg_error *error);
void dg_tokenizer_free(dg_tokenizer *tokenizer);

typedef struct dg_vocab {
    int32_t n_vocab;
    int32_t bos_id, eos_id, unk_id, pad_id, mask_id; /* -1 where the file has none */
    /* a prompt begins with bos_id: the file asks for it, or has Gemma's <bos>, which is needed whatever it asks for */
    bool add_bos;
    const char *chat_template; /* Jinja, or NULL; lives as long as the tokenizer */
} dg_vocab;
const dg_vocab *dg_tokenizer_vocab(const dg_tokenizer *tokenizer);
/* kinds[n_vocab]: the type of each token as it is taken, numbered as in files: 1 normal, 2 unknown, 3 control, 4
 * user-defined, 5 unused, 6 byte. Marks are of type 3 or 4 whatever the file says (marks.def). */
const uint8_t *dg_tokenizer_kinds(const dg_tokenizer *tokenizer);

/* text[n_bytes] (UTF-8; bytes that are not become U+FFFD) -> ids[capacity]. *n_ids is how many ids there are, which may
 * exceed capacity: then nothing past it is written. special: the text of control tokens is read as those tokens.
 * Adds no token of its own. Returns DG_OK, or DG_ERROR_SYSTEM without memory. */
int dg_tokenize(const dg_tokenizer *tokenizer, const char *text, size_t n_bytes, bool special, int32_t *ids,
                size_t capacity, size_t *n_ids, dg_error *error);
/* ids[n_ids] -> text[capacity], not terminated; *n_bytes as above. special: control tokens are written as their text
 * instead of being left out. Returns DG_ERROR_USAGE for an id outside the vocabulary. */
int dg_detokenize(const dg_tokenizer *tokenizer, const int32_t *ids, size_t n_ids, bool special, char *text,
                  size_t capacity, size_t *n_bytes, dg_error *error);

/* ---- Sessions: one timeline each, a cache of what was encoded --------------------------------------------------- */

enum { DG_USUAL_CONTEXT = 8192 };
/* context: most tokens that can be encoded; 0: the model's own, at most the usual and what there is memory for. Memory
 * is taken as it is used, but counts at once: DG_ERROR_MEMORY where the model's budget, or without one the memory that
 * is free now, does not hold all of it. */
int dg_session_new(dg_model *model, int32_t context, dg_session **out, dg_error *error);
void dg_session_free(dg_session *session);
int32_t dg_session_length(const dg_session *session);
int32_t dg_session_context(const dg_session *session);
/* Bytes that a session takes by the time it has held so many tokens: its cache, and what its passes work in. */
int64_t dg_session_bytes(const dg_model *model, int32_t tokens);
/* Bytes that further sessions can take: of the model's budget beside the weights that must stay, or of what is free. 0
 * where the system does not tell. */
int64_t dg_session_room(const dg_model *model);
/* Forgets all but the first `length` tokens. */
int dg_session_rewind(dg_session *session, int32_t length, dg_error *error);

/* Passes of a session look between their layers whether they shall stop. One that does ends its call with
 * DG_ERROR_STOPPED; the session holds what it held before the call, and a generator may be asked for its step again. A
 * pass of several sessions stops where all of them shall. */
/* Stops passes from here on, until it is called with false. Any thread may call it, and a signal handler. */
void dg_session_stop(dg_session *session, bool stop);
/* Returns true to stop; called in the thread that runs the pass, every 20 milliseconds at most. */
typedef bool (*dg_stop)(void *user);
void dg_session_ask(dg_session *session, dg_stop ask, void *user); /* ask: NULL: nobody is asked */

enum { DG_LOGITS_NONE = 0, DG_LOGITS_LAST = 1, DG_LOGITS_ALL = 2 };

/* Appends ids[n] through the causal encoder: all of them or, where it fails, none. logits: float32 [1 or n, n_vocab]
 * next-token logits, softcapped, for the last id or for all, as `which` says. */
int dg_encode(dg_session *session, const int32_t *ids, int32_t n, int32_t which, float *logits, dg_error *error);

/* One pass of the bidirectional decoder over canvas[n] behind the encoded tokens; n is 1 .. canvas_length.
 * condition: NULL, or float32 [n, n_vocab], the previous logits divided by their temperature; -INFINITY is a word
 * without a share.
 * logits: float32 [n, n_vocab], softcapped; may be the same array as condition. */
int dg_denoise(dg_session *session, const int32_t *canvas, int32_t n, const float *condition, float *logits,
               dg_error *error);

/* The same pass, for looking inside: hidden: float32 [n_layer + 1, n, d_model], what goes into the first layer and what
 * comes out of each. */
int dg_denoise_hidden(dg_session *session, const int32_t *canvas, int32_t n, const float *condition, float *hidden,
                      dg_error *error);

/* One canvas of a batch; the fields are dg_denoise's arguments. */
typedef struct dg_canvas {
    dg_session *session;
    const int32_t *canvas;
    int32_t n;
    const float *condition;
    float *logits;
} dg_canvas;

/* One pass over canvases of several sessions of one model, all different: experts see their rows together, attention
 * keeps them apart, and each gets what dg_denoise would have given it, to the bit. */
int dg_denoise_batch(const dg_canvas *canvases, int32_t count, dg_error *error);

/* ---- Generation ------------------------------------------------------------------------------------------------- */

typedef struct dg_sampling {
#define DG_OPTION(kind, name, least, most, help) DG_MEMBER_##kind name;
#include "options.def"
#undef DG_OPTION
} dg_sampling;

/* The file's own settings, else the published ones; max_tokens 0, seed 0. */
void dg_sampling_default(const dg_model *model, dg_sampling *sampling);
/* Sets what the i-th effort stands for, and leaves the rest; false past the end. */
bool dg_effort_apply(int32_t i, dg_sampling *sampling);
/* DG_ERROR_USAGE, naming the option, where a value is out of its range. */
int dg_sampling_check(const dg_sampling *sampling, dg_error *error);

/* What one row of temperature-scaled logits z gives: entropy of softmax(z) in nats, its argmax (the lowest id of
 * equals), and the id drawn by inverse CDF with u in (0, 1). Of a row with NaN or infinity: NaN, -1 and -1. */
typedef struct dg_choice {
    float entropy;
    int32_t argmax;
    int32_t sample;
} dg_choice;
/* z: float32 [n, n_vocab]; u, out: [n]. */
void dg_choose(const float *z, int64_t n, int64_t n_vocab, const double *u, dg_choice *out);

/* Which positions the entropy bound accepts: those before which, in order of entropy (NaN last, the lower position
 * first among equals), the entropies sum to at most `bound`. entropy: float32 [n]; accepted: [n]. */
int dg_accept(const float *entropy, int32_t n, float bound, bool *accepted, dg_error *error);

/* The random draws of one step: u[n] in (0, 1) for the samples, ids[n] uniform over n_vocab for the renoise. They
 * depend on seed, block, step and position alone (Philox4x32-10). Step 0 is the canvas a block starts from (its
 * ids). */
void dg_draw(uint64_t seed, int32_t block, int32_t step, int32_t n, int32_t n_vocab, double *u, int32_t *ids);

typedef enum dg_event_kind { DG_EVENT_STEP = 1, DG_EVENT_BLOCK = 2, DG_EVENT_DONE = 3 } dg_event_kind;

/* An event of a generation. Arrays are the generator's and stand until its next step; n is the canvas's length. Pinned
 * positions have their own id, entropy 0 and are accepted; mean_entropy is over the others (0 where there are none). */
typedef struct dg_event {
    int32_t kind;
    int32_t block; /* canvases finished before this one */
    int32_t index; /* STEP: counted from 0 within the block; BLOCK: steps taken */
    float temperature; /* STEP: of this step */
    int32_t n;
    int32_t place; /* where in the caller's start the canvas begins; 0 without one */
    const int32_t *canvas; /* [n] argmax ids */
    const float *entropy; /* [n] nats */
    const bool *accepted; /* [n] by the entropy bound */
    /* [n] what the next step would see: the draws of accepted positions, random ids elsewhere */
    const int32_t *next;
    float mean_entropy;
    bool converged; /* the stop test held at this step */
    /* [n_final] ids of the answer that this canvas has made final: the first of its tokens, where `commit` asks for
     * that, and all at its BLOCK */
    const int32_t *final;
    int32_t n_final;
} dg_event;

/* Faults of a degenerate answer: EMPTY, no token but end and pad ids; LOOP, the last half of a canvas repeats a
 * few. */
typedef enum dg_fault { DG_FAULT_NONE = 0, DG_FAULT_EMPTY, DG_FAULT_LOOP } dg_fault;

typedef struct dg_block {
    int32_t steps; /* those of draws that were given up for a retry among them */
    int32_t tokens; /* of the answer: end ids and what follows are not counted */
    bool converged;
    int32_t fault; /* dg_fault; canvases of a caller have none */
} dg_block;

typedef struct dg_result {
    const int32_t *ids; /* [n_ids] the answer, without end ids and what follows, at most max_tokens */
    int32_t n_ids;
    const int32_t *places; /* [n_ids] of ids in the caller's start; NULL without one */
    const dg_block *blocks; /* [n_blocks] */
    int32_t n_blocks;
    int32_t steps; /* of all blocks */
    bool converged; /* all blocks */
    /* an end id was found, or the caller's start ends pinned; else max_tokens, or its end, was reached */
    bool stopped;
    int32_t end_id; /* which, or -1 */
    int32_t retries; /* canvases drawn again */
    uint64_t seed; /* the last that was drawn from: the first one's plus retries */
} dg_result;

typedef struct dg_generator dg_generator;

/* Generates behind what the session has encoded. Between canvases the finished one is encoded; the last canvas is not:
 * to go on from it, encode the result's ids and its end_id. */
int dg_generator_new(dg_session *session, const dg_sampling *sampling, dg_generator **out, dg_error *error);

/* A text that the caller begins: pinned ids stay what they are, runs of others are holes (their ids are not read). */
typedef struct dg_start {
    const int32_t *ids;
    const bool *pinned;
    int32_t n;
} dg_start;
/* Denoises the holes of a start around its pins, canvas after canvas of it; max_tokens is not read. Pins are never
 * renoised, count as certain, and are not self-conditioned; draws are by position, whatever is pinned, so that a
 * start of holes alone makes the tokens of dg_generator_new. A hole ends before its first end id, and pad ids in it
 * are filler: what is left of it then goes neither into the result nor into the cache. *start is copied. */
int dg_generator_fill(dg_session *session, const dg_sampling *sampling, const dg_start *start, dg_generator **out,
                      dg_error *error);

/* After a STEP, before the next call: replaces which positions its canvas keeps, accepted[n] of that event; pins are
 * kept whatever it says. DG_ERROR_USAGE at any other time. */
int dg_generator_accept(dg_generator *generator, const bool *accepted, dg_error *error);
/* Works until the next event: STEP after each denoising step, BLOCK after a canvas's last, DONE at the end. */
int dg_generator_next(dg_generator *generator, dg_event *event, dg_error *error);
/* The same for generators of several sessions of one model, all different: those that are at a step take it in one
 * pass. events[count]; the tokens are those that each would have made alone. */
int dg_generators_next(dg_generator *const *generators, int32_t count, dg_event *events, dg_error *error);
/* The result so far; it is the generator's. */
const dg_result *dg_generator_result(dg_generator *generator);
void dg_generator_free(dg_generator *generator);

/* ---- Measuring -------------------------------------------------------------------------------------------------- */

/* One line of profile_parts.def: what the time of a pass is booked under. */
typedef struct dg_part {
    const char *name; /* "experts" */
    const char *covers; /* for people */
} dg_part;
bool dg_part_at(int32_t i, dg_part *out); /* false past the end */

/* What one operation of ops.def took in one part since the profile was started; all sessions of the model together. */
typedef struct dg_profile_entry {
    const char *part, *op;
    double seconds;
    int64_t calls;
} dg_profile_entry;
/* Takes the time of every operation from here on, from zero; while the model is observed too, with what that takes.
 * Start and stop only while no session of the model works. */
int dg_profile_start(dg_model *model, dg_error *error);
void dg_profile_stop(dg_model *model);
/* The i-th entry; false past the end, and where the model is not profiled. */
bool dg_profile_read(const dg_model *model, int32_t i, dg_profile_entry *entry);

/* Observes, from zero, what every matrix is multiplied with: for calibration. It takes about twice the time of a pass.
 * Start and stop only while no session works, which then take turns. */
int dg_moments_start(dg_model *model, dg_error *error);
void dg_moments_stop(dg_model *model);
/* Reads the sums of the matrix of this name, of one expert (0 where there are none): sums[cols] and squares[cols] are
 * those of the inputs of each column and of their squares, *count the rows that were summed. The same for any number
 * of threads. */
int dg_moments_read(const dg_model *model, const char *name, int32_t expert, double *sums, double *squares,
                    int64_t *count, dg_error *error);

/* The i-th tensor of the model's file; false past the end. */
typedef struct dg_weight {
    char name[64];
    int32_t type; /* number of its format */
    int64_t bytes; /* in the file */
} dg_weight;
bool dg_weight_at(const dg_model *model, int32_t i, dg_weight *out);

/* What this machine can do at best, measured now, a second or so each. Work is in operations, two per multiply-add, or
 * in bytes; per second on one thread and on `threads` at once. */
typedef struct dg_peak {
    const char *kind; /* "int8", "float32", "memory" */
    const char *instructions; /* "maddubs", "dpbusd", ...: a machine may have several of a kind */
    double one, all;
} dg_peak;
/* The i-th that this processor has; false past the end. threads: 0: one per processor. */
bool dg_peak_measure(int32_t i, int32_t threads, dg_peak *out);
/* Bytes per second that a file is read at past the page cache, one large read after another for about so many
 * seconds, from its middle on, in the best quarter second; 0 where it is too small to tell or cannot be read. */
double dg_disk_measure(const char *path, double seconds);
/* The clock of a busy core in Hz, from a chain of dependent additions, one cycle each. */
double dg_clock(void);

/* ---- Memory budgets: what lives where, and what a step then takes ----------------------------------------------- */

/* A machine: the numbers of plan.def, in bytes, bytes per second and operations per second. */
typedef struct dg_machine {
    const char *name, *about, *source;
#define DG_RATE(field, unit, scale, optional, help) double field;
#include "plan.def"
} dg_machine;
/* The i-th line of machines.def; NULL past the end. */
const dg_machine *dg_machine_at(int32_t i);

typedef struct dg_rate {
    const char *field, *unit; /* of dg_machine; "GB/s" */
    double scale; /* one such unit */
    bool optional; /* 0 where the machine has no GPU */
    const char *help;
} dg_rate;
const dg_rate *dg_rate_at(int32_t i); /* NULL past the end */

/* What a step asks of a machine. Every expert works at every step, so an expert of a layer, a block, is the same work
 * wherever it is. */
typedef struct dg_demand {
    int32_t n_layer, n_expert;
    int32_t context; /* tokens that the cache is for */
    int64_t process_bytes; /* code, tokenizer, Python, and what threads work in */
    int64_t block_bytes[DG_MAX_LAYERS]; /* one expert of this layer */
    int64_t layer_bytes, top_bytes; /* other weights: of all layers together, and outside of them (the head) */
    int64_t cache_bytes, work_bytes; /* keys and values; what a pass works in */
    int64_t canvas_bytes; /* what a canvas keeps from step to step where the CPU has the output head */
    /* a layer's activations, which CPU and GPU hand each other where both compute */
    int64_t pass_bytes;
    double block_ops; /* of one expert, on average */
    double layer_ops, top_ops; /* all else */
} dg_demand;
enum { DG_PLAN_CONTEXT = 1024 }; /* tokens that budgets are planned for where nobody says how many */
/* From the model's header: no weight is read. Operations are those of matrix products. context: see dg_session_new.
 * device: of a machine that has one; else weights count with what direct reads bring beside them, as under `ram`. */
int dg_model_demand(dg_model *model, int32_t context, bool device, dg_demand *demand, dg_error *error);

typedef enum dg_way {
#define DG_WAY(name, lives, computed, how) DG_WAY_##name,
#include "plan.def"
    DG_WAYS
} dg_way;
typedef struct dg_way_entry {
    const char *lives, *computed, *how;
} dg_way_entry;
const dg_way_entry *dg_way_at(int32_t i); /* NULL past the end */

typedef enum dg_queue {
#define DG_QUEUE(name, text, covers) DG_QUEUE_##name,
#include "plan.def"
    DG_QUEUES
} dg_queue;
typedef struct dg_queue_entry {
    const char *name, *covers;
} dg_queue_entry;
const dg_queue_entry *dg_queue_at(int32_t i); /* NULL past the end */

typedef struct dg_plan {
    /* the GPU computes what is not experts, and holds its weights and the cache */
    bool gpu;
    int32_t blocks[DG_WAYS][DG_MAX_LAYERS]; /* of a layer's experts, how many go which way: the sum is n_expert */
    /* stream buffers: of what is read from disk, of what is copied to the GPU */
    int64_t ram_ring, vram_ring;
    int64_t ram_process, vram_process; /* allowed for code, tokenizer, driver */
    int64_t ram_experts, vram_experts;
    int64_t ram_used, vram_used, ram, vram; /* all together, and the budgets */
    double amount[DG_QUEUES]; /* bytes or operations of a step */
    double busy[DG_QUEUES]; /* seconds of a step */
    /* seconds for what is not experts: no expert can be computed meanwhile */
    double serial;
    double seconds; /* of a step, predicted */
    /* no plan under these budgets takes less than this, whole blocks or not */
    double least;
    int64_t gpu_least; /* a GPU has to have this much VRAM to be of use */
} dg_plan;
/* The fastest plan within the budgets. ram, vram: bytes, or negative: what the machine has, less dg_plan_margin, which
 * gives way to what must be in RAM.
 * DG_ERROR_MEMORY where a budget is too small, with the least that would do, or more than the machine has. */
int dg_plan_make(const dg_demand *demand, const dg_machine *machine, int64_t ram, int64_t vram, dg_plan *plan,
                 dg_error *error);
/* Fills in what a machine makes of a plan's blocks and rings: queues, seconds, bytes. */
void dg_plan_measure(const dg_demand *demand, const dg_machine *machine, dg_plan *plan);
/* The plan that a model under a budget follows; false without one, and on a device before its first session. */
bool dg_model_placed(const dg_model *model, dg_plan *plan);
/* Bytes of RAM that this process can have now without others losing theirs: of the machine, and of the control
 * groups that it is in. Half of all where the system does not tell; 0 where it tells nothing. */
int64_t dg_memory_free(void);
/* Left to others of `ram` or `vram` bytes that are free. */
int64_t dg_plan_margin(double bytes, bool vram);
/* Where one expert goes. */
dg_way dg_plan_way(const dg_plan *plan, int32_t layer, int32_t expert);

#ifndef DG_CFFI
/* Returns false to stop. */
typedef bool (*dg_on_event)(const dg_event *event, void *user);
/* All of the above in one call. on_event may be NULL; the result is freed by dg_result_free. */
int dg_generate(dg_session *session, const dg_sampling *sampling, dg_on_event on_event, void *user, dg_result **out,
                dg_error *error);
void dg_result_free(dg_result *result);
#endif

#endif
