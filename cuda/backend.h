/* The CUDA backend, as backends.c knows it. */
#ifndef DG_CUDA_BACKEND_H
#define DG_CUDA_BACKEND_H

#ifdef __cplusplus
extern "C" {
#endif

struct ops;

bool cuda_usable(void); /* there is a device */
/* Fills the table and takes a device; DG_ERROR_BACKEND, saying why, where there is none that this build runs on. */
int cuda_open(struct ops *o, bool exact, dg_error *error);
void cuda_close(struct ops *o);
/* The first failure since then, if there was one. */
int cuda_status(const struct ops *o, dg_error *error);

/* As dg_overlap_watch and dg_overlap_read; false before experts were placed. */
bool cuda_overlap_watch(const struct ops *o, bool watch);
bool cuda_overlap_read(const struct ops *o, dg_overlap *out);

/* As dg_device_measure, and as ops_device_rated. */
bool cuda_measure(const struct ops *o, dg_device_rates *out);
void cuda_rated(const struct ops *o, dg_machine *machine);

#ifdef __cplusplus
}
#endif
#endif
