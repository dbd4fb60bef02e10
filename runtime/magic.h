/* Recognises files of other kinds by their first bytes. */
#ifndef DG_MAGIC_H
#define DG_MAGIC_H

#include "dg.h"

/* Fails with DG_ERROR_FORMAT. The message says what kind of file begins with these bytes[n]. */
int magic_fail(const char *path, const uint8_t *bytes, uint64_t n, dg_error *error);

#endif
