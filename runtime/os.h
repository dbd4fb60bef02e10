/* All that the project asks of an operating system. */
#ifndef DG_OS_H
#define DG_OS_H

#include "dg.h"

/* Maps a file read-only. */
int os_map(const char *path, const uint8_t **map, uint64_t *size, dg_error *error);
void os_unmap(const uint8_t *map, uint64_t size);

/* Zeroed address space whose pages are taken when first written; NULL without memory. */
void *os_reserve(size_t bytes);
void os_release(void *memory, size_t bytes);
/* Asks for large pages, where the system has them: for reserved memory that is read all over, again and again. */
void os_large_pages(void *memory, size_t bytes);
/* Gives the pages of whole ranges back; they read as zero afterwards, those of a
 * mapped file as the file has them. */
void os_discard(void *memory, size_t bytes);

int32_t os_processors(void); /* that this process may use */
uint64_t os_nanoseconds(void); /* of a clock that only goes forward */

/* A fixed pool of threads. run() calls work(arg, item, thread) for every item in [0, n_items), each once, on any thread
 * in [0, threads); it returns when all are done. Calls from several threads take turns. */
typedef struct pool pool;
typedef void (*pool_work)(void *arg, int64_t item, int32_t thread);
pool *pool_new(int32_t threads); /* NULL without memory or threads */
void pool_free(pool *p);
int32_t pool_threads(const pool *p);
void pool_run(pool *p, pool_work work, void *arg, int64_t n_items);

#endif
