/* Included before each file that is analysed (make analyze): fail() returns the status it is given, never that of
 * success. */
#include "error.h"
#define fail(error, status, ...) ((fail)(error, status, __VA_ARGS__), (status))
