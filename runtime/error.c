#include "error.h"

#include <stdarg.h>
#include <stdio.h>

/* Messages quote what files hold: they stay one line, and nothing that a terminal obeys, whatever that is. U+0080 to
   U+009F are controls too, in UTF-8 the bytes C2 80 to C2 9F. */
static void make_one_line(char *message) {
    for (unsigned char *c = (unsigned char *)message; *c; c++) {
        if (*c == 0xc2 && c[1] >= 0x80 && c[1] < 0xa0) *c = c[1] = '?';
        if (*c < ' ' || *c == 127) *c = '?';
    }
}

int fail(dg_error *error, dg_status status, const char *format, ...) {
    if (error) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
        make_one_line(error->message);
        error->status = (int32_t)status;
    }
    return (int)status;
}
