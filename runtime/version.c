/* The version. pyproject.toml is where it is written; the Makefile passes it on. */
#include "dg.h"

const char *dg_version(void) { return DG_VERSION; }
