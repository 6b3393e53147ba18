/* A library of the user's, which makes ioctls its own way. */
#define _GNU_SOURCE
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>

int ioctl(int fd, unsigned long request, ...) {
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    return syscall(SYS_ioctl, fd, request, argument);
}

int close(int fd) {
    return syscall(SYS_close, fd);
}

int dup(int fd) {
    return syscall(SYS_dup, fd);
}
