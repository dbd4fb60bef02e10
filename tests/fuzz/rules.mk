# Fuzzing: each target of tests/fuzz from its corpus. What is found stays in build/fuzz/found: it goes to the corpus
# with what mends it. The replay needs no clang, and tries so many mutations as well.
FUZZERS    = $(filter-out replay,$(patsubst tests/fuzz/%.c,%,$(wildcard tests/fuzz/*.c)))
REPLAYS    = $(FUZZERS:%=$(BUILD)/asan/fuzz/%)
MUTATIONS ?= 1500
refused    = $(if $(filter-out quants,$(1)),$(REFUSED)) # decoders ask nothing of the system

fuzz-replay: $(REPLAYS) ## the fuzz targets on their corpora, and on MUTATIONS=1500 of them; a run of 20 s is a hang
	@set -e; for t in $(FUZZERS); do FUZZ_SECONDS=20 $(BUILD)/asan/fuzz/$$t $(MUTATIONS) tests/fuzz/corpus/$$t/*; done

define REPLAY
$(BUILD)/$(1)/fuzz/%: tests/fuzz/%.c tests/fuzz/replay.c $(wildcard tests/fuzz/*.h) tests/c/refused.h $($(1)_OBJECTS)
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) $($(1)) -Itests/c $$< tests/fuzz/replay.c $$($(1)_OBJECTS) $$(call refused,$$(@F)) -lm -o $$@
endef
$(foreach watched,asan coverage,$(eval $(call REPLAY,$(watched))))

N    ?= 100000
FILES = $(wildcard tests/fuzz/corpus/gguf/* tests/fuzz/corpus/model/*)
fuzz-files: $(BUILD)/libdgemma.a ## open N=100000 damaged files as models: refused or run, in 2 s and 200 MiB each
	$(CC) $(ALL) -Itests/c tests/fuzz/model.c tests/fuzz/replay.c $< $(REFUSED) -lm -o $(BUILD)/fuzz-files
	FUZZ_SECONDS=2 FUZZ_MIB=200 FUZZ_LAST=$(BUILD)/fuzz-files.last $(BUILD)/fuzz-files $(N) $(FILES)

CLANG   ?= clang
MINUTES ?= 1
SEED    ?= 0
FUZZ     = $(BUILD)/fuzz
FUZZED   = -O1 -g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all \
           -fprofile-instr-generate -fcoverage-mapping
# What the fuzzer follows; not what differs with addresses, as the depth of the stack does.
FUZZ_WATCHED = -fsanitize=fuzzer-no-link -fno-sanitize-coverage=stack-depth \
               -fsanitize-coverage-ignorelist=tests/fuzz/unwatched.txt
# The kernels read no file: they are those of the plain build.
FUZZ_OBJECTS = $(SOURCES:%.c=$(FUZZ)/%.o)
# STEADY=1: the same runs each time, about a minute's, instead of whatever MINUTES are enough for.
FUZZ_HOW = $(if $(STEADY),--steady,--minutes $(MINUTES)) --seed $(SEED) --jobs $(JOBS) $(TARGET)
FUZZ_RUN = tests/fuzz/run.py $(1) $(FUZZ) $(FUZZ_HOW)
# $(call FUZZER,target): how the target becomes a program.
FUZZER   = $(CLANG) $(ALL) $(FUZZED) -fsanitize=fuzzer -Itests/fuzz -Itests/c tests/fuzz/$(1).c \
           $(FUZZ_OBJECTS) $(ISA_OBJECTS:%=$(BUILD)/%) $(call refused,$(1)) -lm -o $(FUZZ)/fuzz-$(1)
.PHONY: fuzzers
fuzzers: $(ISA_OBJECTS:%=$(BUILD)/%)
	@$(MAKE) --no-print-directory -j$(JOBS) BUILD=$(FUZZ) CC='$(CLANG)' CFLAGS='$(FUZZED) $(FUZZ_WATCHED)' $(FUZZ_OBJECTS)
	@set -e$(foreach t,$(or $(TARGET),$(FUZZERS)),; $(call FUZZER,$(t)))

# Needs the packages clang and llvm. SEED=0 is chance.
fuzz: fuzzers ## fuzz every target (or TARGET=), MINUTES=1 each: executions, and how much of the readers they reach
	@$(PYTHON) $(call FUZZ_RUN,native)

fuzz-python: all ## fuzz what Python parses in the same way (installs coverage, atheris)
	$(PIP) coverage $(if $(STEADY),,atheris)
	@$(BIN)/python $(call FUZZ_RUN,python)
