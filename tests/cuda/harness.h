/* A test of the CUDA backend: the table of operations beside the reference, arrays on both sides, and runs with many
 * seeds over the emulation (on a device, one run). */
#ifndef HARNESS_H
#define HARNESS_H

#include <functional>
#include <initializer_list>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vector>

#include "blocks.h"
#include "cuda.h"
extern "C" {
#include "../c/check.h"
#include "../c/material.h"
}

/* The reference and the backend; exact: without rounded activations. */
struct both {
    ops *plain = nullptr, *gpu = nullptr;
    explicit both(bool exact = true) {
        static const dg_config config = [] {
            dg_config c = {};
            c.d_model = 2048, c.d_ffn = c.d_expert = 64, c.n_layer = 1, c.n_head = 4, c.head_dim = 512,
            c.head_dim_swa = 64, c.n_head_kv[0] = 1;
            return c;
        }();
        dg_error error;
        dg_model_options options = {};
        options.backend = "reference", options.threads = 2, options.exact = true;
        if (ops_new(&options, &config, &plain, &error) != DG_OK) abort();
        options.backend = "cuda";
        options.exact = exact;
        const int status = ops_new(&options, &config, &gpu, &error);
        CHECK(status == DG_OK, "%s", error.message);
        if (status != DG_OK) exit(1);
    }
    ~both() {
        dg_error error;
        CHECK(ops_status(gpu, &error) == DG_OK, "%s", error.message);
        ops_free(plain);
        ops_free(gpu);
    }
    both(const both &) = delete;
};

/* An array of the caller's and its copy in the backend's memory, which starts like it. */
template <class T> struct paired {
    const ops *o;
    std::vector<T> host;
    T *device = nullptr;
    paired(const both &b, std::vector<T> values) : o(b.gpu), host(std::move(values)) {
        void *p = nullptr;
        o->reserve(o, &p, host.size() * sizeof(T));
        if (!p) abort();
        device = static_cast<T *>(p);
        o->upload(o, device, host.data(), host.size() * sizeof(T));
    }
    paired(const both &b, size_t n) : paired(b, std::vector<T>(n)) {}
    ~paired() { o->release(o, device, host.size() * sizeof(T)); }
    paired(const paired &) = delete;
    T *data() { return host.data(); }
    std::vector<T> fetch() const {
        std::vector<T> out(host.size());
        o->download(o, out.data(), device, out.size() * sizeof(T));
        return out;
    }
};

static inline std::vector<float> random_floats(int64_t n, float scale) {
    float *x = numbers(n, scale);
    std::vector<float> out(x, x + n);
    free(x);
    return out;
}

/* Largest difference, in parts of the largest number. */
static inline double error_between(const std::vector<float> &got, const std::vector<float> &want) {
    for (float v : got)
        if (!(v == v)) return INFINITY;
    return error_of(got.data(), want.data(), static_cast<int64_t>(want.size()));
}

/* A weight with its copy on the device; columns, rows and experts of any format. change: what is done to the data
 * before. */
struct weight {
    const ops *o;
    tensor t;
    weight(const both &b, int32_t format, int64_t cols, int64_t rows, int64_t experts = 1,
           const std::function<void(uint8_t *)> &change = nullptr)
        : o(b.gpu), t(weights(format, cols, rows, experts)) {
        if (change) change(const_cast<uint8_t *>(t.data));
        o->place(o, &t);
    }
    ~weight() { free(const_cast<uint8_t *>(t.data)); }
    weight(const weight &) = delete;
};

/* Room of the head op on both sides. */
struct self_cond_pair {
    const both &b;
    self_cond plain, gpu;
    self_cond_pair(const both &side, int64_t n, int64_t n_vocab, int64_t d)
        : b(side), plain(self_cond_new(n, n_vocab, d)) {
        void *memory = nullptr;
        self_cond_lay_out(&gpu, n, n_vocab, d, false, nullptr);
        b.gpu->reserve(b.gpu, &memory, gpu.bytes);
        self_cond_lay_out(&gpu, n, n_vocab, d, false, memory);
    }
    ~self_cond_pair() {
        b.gpu->release(b.gpu, gpu.memory, gpu.bytes);
        self_cond_free(&plain);
    }
    self_cond_pair(const self_cond_pair &) = delete;
};

/* Runs test() for the variant of argv[1]: many seeds plainly, fewer where it takes longer. */
static inline int run_seeds(const char *room, int argc, char **argv, void (*test)(uint64_t seed)) {
    const char *variant = argc > 1 ? argv[1] : "plain";
    const uint64_t seeds = strcmp(variant, "plain") == 0 ? 4 : strcmp(variant, "races") == 0 ? 2 : 1;
#ifdef SHIM_H
    for (int architecture : {80, 75})
        for (uint64_t s = 0; s < (architecture == 75 ? 1 : seeds); s++) {
            shim::architecture = architecture;
            shim::seed(s + (strcmp(variant, "races") == 0)); /* orders that the plain run did not end with */
            test(s);
        }
#else
    for (uint64_t s = 0; s < seeds; s++) test(s);
#endif
    return check_done(room);
}

#endif
