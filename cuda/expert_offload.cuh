/* The places of a layer's experts: without a plan, all are in their tensors on the device. With a plan, some stay in
 * the device's memory, some are copied there through a ring of buffers, and the CPU computes the others at the same
 * time.
 */
#ifndef DG_CUDA_EXPERT_OFFLOAD_H
#define DG_CUDA_EXPERT_OFFLOAD_H

#include "cuda.h"

/* One of a layer's three matrices of all experts: one after another, or each in its expert's piece (see
 * expert_layout). */
struct expert_matrix {
    const unsigned char *data;
    int64_t stride;
    const unsigned char *const *at; /* [n_expert]; NULL: by stride */
    int64_t shift;
    __device__ const unsigned char *of(int32_t e) const { return at ? at[e] + shift : data + e * stride; }
};

/* Experts at places [from, to) of a layer's order: those that a launch is about. */
struct portion {
    int32_t from, to;
    const int32_t *places; /* [n_expert], of each expert; NULL: its number */
    __device__ bool has(int32_t e) const {
        const int32_t place = places && e >= 0 ? places[e] : e;
        return place >= from && place < to;
    }
};

/* A layer under a plan. */
struct layer_offload {
    const layer *weights;
    int32_t pinned, streamed;     /* places [0, pinned) and the next: as expert_plan has them */
    const int32_t *order;         /* [n_expert] the expert at each place, of the plan's */
    int32_t *places;              /* [n_expert] its reverse, on the device */
    int64_t shift[3], bytes;      /* of one expert's piece */
    unsigned char *here, *locked; /* pinned pieces on the device; streamed ones in page-locked memory */
    const unsigned char **at;     /* [n_expert], on the device */
    int32_t first_job, n_jobs, per_job;
};

/* Returns the places of the layer whose gates these are. NULL: its tensors hold all its experts. */
const layer_offload *layer_offload_of(const gpu *g, const tensor *gate);
/* Gate, up or down (0, 1, 2) for kernels. */
expert_matrix expert_matrix_of(const layer_offload *h, const tensor *w, int which);
/* All that the device computes of a layer. */
portion portion_here(const layer_offload *h, int32_t n_expert);

/* The CPU's part of the operation, which runs at the same time as the device's work between the two calls: y[n][d] is
 * the sum over the CPU's experts. */
bool begin_beside(const launch &t, const layer_offload *h, float *y, const float *x, const int32_t *experts,
                  const float *weights, int64_t n, int64_t k);
void end_beside(const launch &t);

/* Waits for a job's copies; frees its buffer for a later one. */
portion job_arrived(const launch &t, const layer_offload *h, int32_t job);
void job_used(const launch &t, int32_t job);

/* Calls compute(portion) for all that the device computes of a layer. */
template <class F>
static inline void for_portions(const launch &t, const layer_offload *h, int32_t n_expert, F compute) {
    if (!h) {
        compute(portion_here(h, n_expert));
        return;
    }
    if (h->pinned) compute(portion{0, h->pinned, h->places});
    for (int32_t job = h->first_job; job < h->first_job + h->n_jobs; job++) {
        compute(job_arrived(t, h, job));
        job_used(t, job);
    }
}

/* While passes are watched they are not recorded. */
bool watched(const gpu *g);

void close_offload(gpu *g);

#endif
