# The one build recipe. `make help` lists the targets.
PYTHON  ?= python3
VENV    ?= .venv
BUILD   ?= build
BIN      = $(VENV)/bin
CC      ?= cc
CFLAGS  ?= -O3 -g1
WARN     = -Wall -Wextra -Wshadow -Wpointer-arith -Wstrict-prototypes -Wmissing-prototypes -Wundef $(if $(CI),-Werror)
ALL      = -std=c11 -fPIC -ffp-contract=off -pthread -Iquants -Iruntime $(WARN) $(CFLAGS)

SOURCES  = $(wildcard quants/*.c runtime/*.c runtime/cpu/*.c)
OBJECTS  = $(SOURCES:%.c=$(BUILD)/%.o)
LIBRARY  = $(BUILD)/libdgemma.a

X86     := $(shell $(CC) -dM -E - </dev/null | grep -c __x86_64__)
$(BUILD)/runtime/cpu/avx2.o: ALL += $(if $(filter 1,$(X86)),-mavx2 -mfma -mf16c)

# ---- the library and the Python extension ----
.PHONY: lib native
lib: $(LIBRARY)

$(LIBRARY): $(OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL) -MMD -MP -c $< -o $@

# NATIVE is where the extension goes; setuptools names it. The public header is the cdef.
NATIVE ?= runtime/dgemma/_native.abi3.so
native: $(NATIVE)

DEFS = $(wildcard runtime/*.def quants/*.def) runtime/dg.h quants/formats.h
$(BUILD)/native.c: $(DEFS)
	@mkdir -p $(@D)
	$(CC) -E -P -DDG_CFFI -Iquants -Iruntime runtime/dg.h > $(BUILD)/native.cdef
	@echo '#include "dg.h"' > $(BUILD)/native.prelude
	$(PYTHON) -m cffi.gen_src read-sources dgemma._native $(BUILD)/native.cdef $(BUILD)/native.prelude $@ >/dev/null

$(NATIVE): $(BUILD)/native.c $(LIBRARY)
	$(CC) $(ALL) -Wno-missing-field-initializers -Wno-cast-function-type $(PYTHON_INCLUDE) -shared $< $(LIBRARY) -lm -o $@

# ---- C tests, always under AddressSanitizer and UBSan ----
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
C_TESTS  = $(patsubst tests/c/%.c,$(BUILD)/asan/%,$(wildcard tests/c/*.c))
.PHONY: test-asan
test-asan: $(C_TESTS)
	@set -e; for t in $(C_TESTS); do $$t; done

$(BUILD)/asan/%: tests/c/%.c tests/c/check.h $(SOURCES:%.c=$(BUILD)/asan/%.o)
	$(CC) $(ALL) $(SANITIZE) -Itests/c $< $(SOURCES:%.c=$(BUILD)/asan/%.o) -lm -o $@

$(BUILD)/asan/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(ALL) $(SANITIZE) -MMD -MP -c $< -o $@
$(BUILD)/asan/runtime/cpu/avx2.o: ALL += $(if $(filter 1,$(X86)),-mavx2 -mfma -mf16c)

-include $(OBJECTS:.o=.d) $(SOURCES:%.c=$(BUILD)/asan/%.d)
