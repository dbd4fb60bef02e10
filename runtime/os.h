/* All that the project asks of an operating system. Pools, threads and mutexes outlive a fork: see each. */
#ifndef DG_OS_H
#define DG_OS_H

#include "dg.h"

struct stat;

/* Which file it is and how it stood: another one of the same name, or one written to since, differs. */
typedef struct os_identity {
    uint64_t device, inode, bytes;
    int64_t changed; /* nanoseconds */
} os_identity;

os_identity os_identity_of(const struct stat *info);

/* Maps a file read-only. identity may be NULL. From then on, what the file has lost reads as zeros. */
int os_map(const char *path, const uint8_t **map, uint64_t *size, os_identity *identity, dg_error *error);
void os_unmap(const uint8_t *map, uint64_t size);
/* DG_ERROR_SYSTEM where the file of that map shrank, or could not be read, and so someone saw zeros. */
int os_map_check(const char *path, const uint8_t *map, uint64_t size, dg_error *error);
/* Puts memory of the process's own in the place of a map: its first `keep` bytes stay what they are, whatever
 * becomes of the file, and the rest is zero until written. Address and os_unmap stay the same. False without memory. */
bool os_own(const uint8_t *map, uint64_t keep, uint64_t size);

/* A file read past the page cache where the file system allows it, else without leaving anything in it. */
typedef struct os_file os_file;
/* DG_ERROR_SYSTEM where the path now leads to another file than `same`; NULL: whatever is there. */
int os_file_open(const char *path, const os_identity *same, os_file **out, dg_error *error);
void os_file_close(os_file *file);
/* Reads up to `bytes` at `offset` into `to`, all three multiples of os_granule(): returns how many, 0 at the end, or
 * -errno. */
int64_t os_file_read(os_file *file, void *to, int64_t bytes, int64_t offset);
/* DG_ERROR_SYSTEM where the file was written to or cut since it was opened. */
int os_file_check(const os_file *file, dg_error *error);
bool os_file_direct(const os_file *file); /* reads go past the page cache */
int64_t os_file_bytes(const os_file *file);
int64_t os_granule(void); /* a power of two: of memory that can be given back and of direct reads */
int64_t os_resident(void); /* bytes of memory that this process takes now */
int64_t os_anonymous(void); /* of that what is no file's, where the system tells it apart */

/* Zeroed address space whose pages are taken when first written; NULL without memory. */
void *os_reserve(size_t bytes);
void os_release(void *memory, size_t bytes);
/* Asks for large pages, where the system has them: for reserved memory that is read all over, again and again. */
void os_large_pages(void *memory, size_t bytes);
void os_small_pages(void *memory, size_t bytes); /* no large ones any more */
/* Gives the pages of whole ranges back; they read as zero afterwards, those of a
 * mapped file as the file has them. */
void os_discard(void *memory, size_t bytes);

int32_t os_processors(void); /* that this process may use */
int64_t os_memory(void); /* bytes of RAM that the machine has; 0 where the system does not tell */
/* Returns the bytes that the limits of a control group ("/a/b", seen from the folder of its file system) and of those
 * above it leave; negative without a limit. unified: as version 2 tells it. */
int64_t os_group_memory(const char *folder, const char *group, bool unified);
/* Bytes per second that the link of a PCI device carries each way, from its folder in sysfs and that of the port it
 * is in; 0 where they do not tell. */
double os_link_rate(const char *folder);
uint64_t os_nanoseconds(void); /* of a clock that only goes forward */

/* A fixed pool of threads. run() calls work(arg, item, thread) for every item in [0, n_items), each once, on any
 * thread in [0, threads); it returns when all are done. Calls from several threads take turns. A forked process gets
 * threads of its own at its first run. */
typedef struct pool pool;
typedef void (*pool_work)(void *arg, int64_t item, int32_t thread);
pool *pool_new(int32_t threads); /* NULL without memory or threads */
void pool_free(pool *p);
int32_t pool_threads(const pool *p);
void pool_run(pool *p, pool_work work, void *arg, int64_t n_items);

/* A thread of its own. In a forked process it does not run, and is joined at once. */
typedef struct os_thread os_thread;
os_thread *os_thread_start(void (*work)(void *arg), void *arg); /* NULL without memory or threads */
void os_thread_join(os_thread *t);
bool os_thread_runs(const os_thread *t);

int32_t os_forks(void); /* that lie behind this process: another number than before in a forked one */

/* A mutex with one condition variable. A fork waits until no thread holds it, and then finds what it guards whole; so
 * a thread that takes one while it holds another takes the older one first. It is free in the forked process. */
typedef struct os_mutex os_mutex;
os_mutex *os_mutex_new(void); /* NULL without memory */
void os_mutex_free(os_mutex *m);
void os_mutex_lock(os_mutex *m);
void os_mutex_unlock(os_mutex *m);
void os_mutex_wait(os_mutex *m); /* on the condition variable, until os_mutex_wake_all; others may lock meanwhile */
void os_mutex_wake_all(os_mutex *m);

#endif
