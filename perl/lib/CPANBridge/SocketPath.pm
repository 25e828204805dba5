package CPANBridge::SocketPath;

use 5.010;
use strict;
use warnings;

use Fcntl ();

our $VERSION = '0.6.0';

# The paths at which the daemon may listen, in the order in which they are to be tried: a list
# of [path, problem, is_set]. A path with a problem must not be used. Of those that were set, each is
# tried. The daemon has the same rules.
sub candidates {
    my $set = defined $ENV{CPAN_BRIDGE_SOCKET} ? $ENV{CPAN_BRIDGE_SOCKET} : '';
    if (my @paths = grep { $_ ne '' } map { /\A\s*(.*?)\s*\z/s } split /,/, $set) {
        return map { [ $_, undef, 1 ] } @paths;
    }
    my $system = '/run/cpanbridged/cpanbridged.sock';
    return ([$system]) if $> == 0;
    my $runtime = $ENV{XDG_RUNTIME_DIR};
    my $folder  = "/tmp/cpanbridged-$>";
    return (
        (defined $runtime && $runtime ne '' ? ["$runtime/cpanbridged.sock"] : ()),
        [ "$folder/cpanbridged.sock", not_private($folder) ],
        [$system],
    );
}

# Why a folder where any user can create one is not trusted; undef if it is.
sub not_private {
    my ($folder) = @_;
    my ($mode, $owner) = (lstat $folder)[ 2, 4 ];
    return undef if !defined $mode;    # it does not exist, as connect will report
    return 'refused, because it is not a folder' if !Fcntl::S_ISDIR($mode);
    return "refused, because user $owner owns $folder" if $owner != $>;
    return "refused, because others have rights to $folder (chmod 700 it)" if $mode & 077;
    return undef;
}

1;

__END__

=head1 NAME

CPANBridge::SocketPath - where the daemon listens

=head1 DESCRIPTION

If C<CPAN_BRIDGE_SOCKET> is set, only at its paths. Like the daemon's, it may have several
separated by commas: each is tried, in their order, until one can be connected to. Blanks around a
path, and empty paths, are ignored. Otherwise, for root:
F</run/cpanbridged/cpanbridged.sock>. For other users, at the first of these that exists:

=over

=item F<$XDG_RUNTIME_DIR/cpanbridged.sock>

=item F</tmp/cpanbridged-UID/cpanbridged.sock>

Only if the folder belongs to the user and no other user has any right to it: every user may create a
folder in F</tmp>.

=item F</run/cpanbridged/cpanbridged.sock>

=back

In a script that runs with taint checks (C<perl -T>), a path from the environment is tainted, and some
Perls refuse to connect to it: give the option C<socket> of L<CPANBridge> explicitly.

=head1 FUNCTIONS

=over

=item candidates()

These as a list of C<[path, problem, is_set]>. A path with a problem is not used. If one exists
but can't be connected to, those after it are tried only if C<is_set> is true.

=item not_private($folder)

Why the folder is not trusted, or undef.

=back

=cut
