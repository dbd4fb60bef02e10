# Coverage: which lines the tests run. C: the programs of tests/c and the corpora of tests/fuzz, on this processor,
# without CUDA. Python: all of test-python, with the processes that it starts, unless they are killed; but for the test
# that bounds the size of files, as coverage's own would be refused.
COVERAGE = $(BUILD)/coverage
COVERED  = $(call C_TESTS,coverage) $$(addprefix $(COVERAGE)/fuzz/,$$(FUZZERS))
GCOVR    = $(BIN)/gcovr --filter quants/ --filter runtime/ --merge-lines --txt $(COVERAGE)/c.txt --print-summary
BOUNDED  = tests/test_convert.py::test_a_limit_of_the_system_is_told
coverage: all $(COVERED) ## lines of C and Python that the tests run, a total of each (installs coverage, gcovr)
	$(PIP) 'coverage>=7.10' gcovr
	@find $(COVERAGE) -name '*.gcda' -delete; rm -rf $(COVERAGE)/data; mkdir -p $(COVERAGE)/data
	@set -e; for t in $(call C_TESTS,coverage); do $$t; done
	@set -e; for t in $(FUZZERS); do $(COVERAGE)/fuzz/$$t 0 tests/fuzz/corpus/$$t/*; done
	@$(GCOVR) $(COVERAGE) > $(COVERAGE)/c.total
	$(BIN)/coverage run -m pytest $(WORKERS) -m "not oracle and not cuda" --deselect $(BOUNDED)
	@$(BIN)/coverage combine --quiet && $(BIN)/coverage report > $(COVERAGE)/python.txt
	@cat $(COVERAGE)/c.txt $(COVERAGE)/python.txt
	@sed -n 's/^lines: /C: /p' $(COVERAGE)/c.total
	@tail -1 $(COVERAGE)/python.txt | awk '{ ran = $$2 - $$3; \
		printf "Python: %.1f%% (%d out of %d)\n", 100 * ran / $$2, ran, $$2 }'
