/* What the columns of each matrix are multiplied with, for calibration. While a model is observed, wrappers take the place
 * of the operations that multiply by a matrix; otherwise nothing is there and nothing costs. */
#ifndef DG_MOMENTS_H
#define DG_MOMENTS_H

struct ops;
typedef struct moments moments;
void moments_free(struct ops *o);

#endif
