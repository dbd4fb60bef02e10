/* Gemma's BPE with byte fallback; the public half is in dg.h. */
#ifndef DG_TOKENIZER_H
#define DG_TOKENIZER_H

#include "gguf.h"

/* Reads the tokenizer of an open file, which must outlive it. */
int tokenizer_new(const gguf *file, dg_tokenizer **out, dg_error *error);
/* The id of exactly this token text, or -1. */
int32_t tokenizer_find(const dg_tokenizer *tokenizer, const char *token);
/* The i-th mark that may end an answer: its id, or -1 where the vocabulary has none, and whether an answer ends at
 * it though the file's list of such ids lacks it. False past the last. */
bool tokenizer_end_mark(const dg_tokenizer *tokenizer, int32_t i, int32_t *id, bool *always);

#endif
