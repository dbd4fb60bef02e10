/* Gemma's BPE with byte fallback; the public half is in dg.h. */
#ifndef DG_TOKENIZER_H
#define DG_TOKENIZER_H

#include "gguf.h"

/* Reads the tokenizer of an open file, which must outlive it. */
int tokenizer_new(const gguf *file, dg_tokenizer **out, dg_error *error);
/* The id of exactly this token text, or -1. */
int32_t tokenizer_find(const dg_tokenizer *tokenizer, const char *token);

#endif
