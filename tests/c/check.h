/* A test is a program: CHECK reports what failed and goes on; main ends with `return check_done("room");`. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>

static int checks, failures;

#define CHECK(condition, ...)                                               \
    do {                                                                    \
        checks++;                                                           \
        if (!(condition)) {                                                 \
            failures++;                                                     \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            fprintf(stderr, __VA_ARGS__);                                   \
            fputc('\n', stderr);                                            \
        }                                                                   \
    } while (0)

static inline int check_done(const char *room) {
    printf("%s: %d checks, %d failed\n", room, checks, failures);
    return failures != 0 || checks == 0;
}

#endif
