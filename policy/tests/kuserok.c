/* Says of each principal whether MIT's krb5_kuserok lets it in as a local user, and how the library writes its name:
 *
 *     kuserok USER PRINCIPAL...
 *     yes alice@EX.ORG
 *     no mallory@EX.ORG
 *     malformed mallory@EX/ORG
 */
#include <krb5.h>
#include <stdio.h>

static int fail(krb5_context context, const char *what, krb5_error_code code)
{
    fprintf(stderr, "%s: %s\n", what, krb5_get_error_message(context, code));
    return 1;
}

int main(int argc, char **argv)
{
    krb5_context context;
    krb5_error_code code = krb5_init_context(&context);

    if (code)
        return fail(NULL, "krb5_init_context", code);
    for (int i = 2; i < argc; i++) {
        krb5_principal principal;
        char *name;

        if (krb5_parse_name(context, argv[i], &principal)) {
            printf("malformed %s\n", argv[i]);
            continue;
        }
        if ((code = krb5_unparse_name(context, principal, &name)))
            return fail(context, argv[i], code);
        printf("%s %s\n", krb5_kuserok(context, principal, argv[1]) ? "yes" : "no", name);
        krb5_free_unparsed_name(context, name);
        krb5_free_principal(context, principal);
    }
    krb5_free_context(context);
    return 0;
}
