/* What an analyser is told before each file (make analyze): fail() returns the status it is given, never that of
 * success. */
#include "error.h"
#define fail(error, status, ...) ((fail)(error, status, __VA_ARGS__), (status))
