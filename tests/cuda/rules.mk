# Kernels and backend as C++ over the emulation of tests/cuda, in three variants: as it is, with ASan and UBSan, and
# with the hooks of the race checker. Each has the whole library, its backends.c with the backend.
CXX       ?= c++
EMULATED   = $(BUILD)/cuda
EMU_FLAGS  = -std=c++17 -fPIC -ffp-contract=off -fno-threadsafe-statics -Wall -Wextra -Wshadow -Wundef \
             $(if $(CI),-Werror) -isystem $(CUDA_HOME)/include -Itests/cuda -Icuda -Iquants -Iruntime
EMU_plain  = -O1 -g1
EMU_asan   = $(asan)
EMU_races  = -O1 -g
EMU_hooks_races = -fsanitize=thread
EMU_link_plain  = -ldl
EMU_link_races  = -rdynamic -Wl,--wrap=memcpy,--wrap=memset -ldl
EMU_parts_races = races
EMU_library = $(filter-out $(1)runtime/backends.o,$(2))
EMU_library_plain = $(call EMU_library,$(BUILD)/,$(OBJECTS))
EMU_library_races = $(call EMU_library,$(BUILD)/,$(OBJECTS))
EMU_library_asan  = $(call EMU_library,$(BUILD)/asan/,$(asan_OBJECTS))
EMU_TESTS  = $(patsubst tests/cuda/%.cu,%,$(wildcard tests/cuda/*_test.cu))

define EMULATED_RULES
$(EMULATED)/$(1)/%.cu.o: %.cu $(CUDA_HOME)/bin/nvcc
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_FLAGS) $$(EMU_$(1)) $$(EMU_hooks_$(1)) -MMD -MP -x c++ -c $$< -o $$@
$(EMULATED)/$(1)/%.cpp.o: %.cpp $(CUDA_HOME)/bin/nvcc
	@mkdir -p $$(@D)
	$$(CXX) $$(EMU_FLAGS) $$(EMU_$(1)) -MMD -MP -c $$< -o $$@
$(EMULATED)/$(1)/runtime/backends.o: runtime/backends.c
	@mkdir -p $$(@D)
	$$(CC) $$(ALL) $$(EMU_$(1)) -DDG_CUDA -MMD -MP -c $$< -o $$@
EMU_shim_$(1) = $$(patsubst %,$(EMULATED)/$(1)/tests/cuda/%.cpp.o,shim runtime $(EMU_parts_$(1)))
EMU_objects_$(1) = $$(KERNELS:%=$(EMULATED)/$(1)/%.o) $(EMULATED)/$(1)/runtime/backends.o \
                   $$(EMU_library_$(1)) $$(EMU_shim_$(1))
$(EMULATED)/$(1)/%_test: $(EMULATED)/$(1)/tests/cuda/%_test.cu.o $$(EMU_objects_$(1))
	$$(CXX) $$(EMU_$(1):-fsanitize=thread=) $$^ -lm -pthread $$(EMU_link_$(1)) $$($$(*F)_LINK) -o $$@
.PRECIOUS: $(EMULATED)/$(1)/%.cu.o $(EMULATED)/$(1)/%.cpp.o
-include $$(shell find $(EMULATED)/$(1) -name '*.d' 2>/dev/null)
endef
$(foreach v,plain asan races,$(eval $(call EMULATED_RULES,$(v))))

# The calls of the runtime that tests/cuda/lost_test.cu stands before: all that the backend makes, and kernels.
LOST_CALLS = $(shell sed -n 's/^\(TAKE\|GIVE\|CALL\).\([A-Za-z0-9_]*\),.*/\2/p' tests/cuda/lost_test.cu)
lost_LINK  = $(LOST_CALLS:%=-Wl,--wrap=%)

# The package with the emulated backend beside the built one, for whole models.
EMU_PACKAGE = $(EMULATED)/python/dgemma
EMU_SOURCES = $(addprefix $(CURDIR)/runtime/dgemma/,[!_]* __init__.py _b*) $(CURDIR)/convert
$(EMU_PACKAGE)/_native.abi3.so: $(BUILD)/native.c $(EMU_objects_plain)
	@rm -rf $(EMU_PACKAGE) && mkdir -p $(EMU_PACKAGE) && ln -s $(EMU_SOURCES) $(EMU_PACKAGE)
	$(CXX) -shared -fPIC $(EMU_plain) $(PYTHON_INCLUDE) -Iquants -Iruntime -x c $(BUILD)/native.c -x none \
		$(EMU_objects_plain) -lm -pthread $(EMU_link_plain) -o $@

# $(call emulated,variants): their test programs, to be made with EMU_MAKE. $(call run_emulated,variants) runs them.
EMU_MAKE     = $(MAKE) --no-print-directory PYTHON=$(BIN)/python
emulated     = $(foreach v,$(1),$(EMU_TESTS:%=$(EMULATED)/$(v)/%))
run_emulated = set -e; for v in $(1); do for t in $(EMU_TESTS); do $(EMULATED)/$$v/$$t $$v; done; done

# Threads and copies run in other orders as well.
test-cuda-emulated: all cuda-toolkit ## CUDA kernels and backend on the CPU, against the reference; whole models
	+@$(EMU_MAKE) $(call emulated,plain)
	@$(call run_emulated,plain)
	+@$(EMU_MAKE) $(EMU_PACKAGE)/_native.abi3.so
	DG_SHIM=1 PYTHONPATH=$(EMULATED)/python $(BIN)/python -m pytest -q -m cuda tests/test_cuda.py

test-cuda-watched: all cuda-toolkit ## the same kernels under ASan and UBSan, and under the race checker (longer)
	+@$(EMU_MAKE) $(call emulated,asan races)
	@$(call run_emulated,asan races)

# The same tests on a GPU: the programs link with nvcc as they are. Those of the emulation alone are not among them.
GPU_TESTS = $(patsubst %,$(BUILD)/gpu/%,$(filter-out shim_test lost_test,$(EMU_TESTS)))
$(BUILD)/gpu/%_test: tests/cuda/%_test.cu tests/cuda/harness.h $(BUILD)/libdgemma.a
	@mkdir -p $(@D)
	$(CUDA_HOME)/bin/nvcc $(NVCC_FLAGS) -Itests/cuda $(GENCODE) $< $(BUILD)/libdgemma.a -L$(CUDA_HOME)/lib \
		-Xcompiler -pthread -lm -o $@

# GPU_TABLE: options of tests/measure/gpu.py, such as '--types q4_k_m' where the disk has no room for 50 GB of bf16.
gpu-check: ## on a machine with a GPU: kernels against the reference, compute-sanitizer, whole models, figures
	@$(MAKE) --no-print-directory CUDA=1 all $(GPU_TESTS)
	@set -e; for t in $(GPU_TESTS); do $$t; done
	@if command -v compute-sanitizer >/dev/null; then \
		set -e; for t in $(GPU_TESTS); do for tool in memcheck racecheck; do \
			compute-sanitizer --tool $$tool --error-exitcode 1 $$t races; done; done; \
	else echo 'not run: compute-sanitizer is not on the path' >&2; fi
	$(BIN)/python -m pytest -q -m cuda tests/test_cuda.py
	@set -e; for b in cpu cuda; do echo "Sudoku, $$b"; \
		$(BIN)/python tests/measure solve_rate --backend $$b --seeds 1; done
	$(BIN)/python tests/measure gpu --cache $(BENCH_CACHE) --json tests/bench/gpu.json $(GPU_TABLE)
