/* Floods whoever writes down what guests do, and then makes another VM: `pauses MSR COUNT`. Ends by a signal only. */
#include "guest.h"

int main(int count, char **words) {
    (void)count;
    char text[64];
    snprintf(text, sizeof text, "c:%s=%s", words[1], words[2]);
    struct machine first = new_machine(0x1000);
    struct vcpu vcpu = new_vcpu(&first, 0);
    tell("first", &vcpu, text);
    struct machine second = new_machine(0x1000);
    struct vcpu other = new_vcpu(&second, 0);
    tell("second", &other, "w:0x174=1");
    printf("process %d\n", getpid());
    fflush(stdout);
    for (;;)
        access_of(&other, "a:0x174=1000");
}
