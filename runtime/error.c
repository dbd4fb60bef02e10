#include "error.h"

#include <stdarg.h>
#include <stdio.h>

int fail(dg_error *error, dg_status status, const char *format, ...) {
    if (error) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->message, sizeof error->message, format, arguments);
        va_end(arguments);
        error->status = (int32_t)status;
    }
    return (int)status;
}
