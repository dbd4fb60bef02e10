/* Errors are one line in the caller's buffer. */
#ifndef DG_ERROR_H
#define DG_ERROR_H

#include "dg.h"

/* Writes the message (cut at the buffer's end) and returns status, so that a function can `return fail(...)`. */
int fail(dg_error *error, dg_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
