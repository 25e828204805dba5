package CPANBridge::JSON;

use 5.010;
use strict;
use warnings;

use CPANBridge::JSON::Decoder;
use CPANBridge::JSON::Encoder;

our $VERSION = '0.6.0';

# Loading Cpanel::JSON::XS takes about as long as decoding this many bytes in pure Perl.
use constant WORTH_LOADING => 256 * 1024;

# A decoder in C; 0 if there is none that gives the same data; undef before the first check.
my $xs;
my $decoded = 0;

# What a decoder must decode correctly before it is used for replies.
use constant PROBES => (
    '[0.1,3.141592653589793,1.7976931348623157e+308,5e-324,2.2250738585072014e-308,1e22]',
    '[0.30000000000000004,123456.78901234567,9007199254740993.0,8.41e21,0.00005,-0.0]',
    '[0,-1,2147483648,9007199254740993,-999999999999999999,"007","1.0",[[]],{"a":{}}]',
    qq(["","\\u00e9\\ud83d\\ude00\\n\\u0000\xc3\xa9\xf0\x9f\x98\x80",null,true,false]),
);

*encode = \&CPANBridge::JSON::Encoder::encode;

sub decode {
    my ($bytes) = @_;
    # A decoder in C returns booleans that it has made before, and they may have been taken away.
    return CPANBridge::JSON::Decoder::decode($bytes) if CPANBridge::JSON::Decoder::in_global_destruction();
    if (!defined $xs) {
        $decoded += length $bytes;
        if ($decoded > WORTH_LOADING || $INC{'Cpanel/JSON/XS.pm'}) {
            $xs = _find_xs();
        }
    }
    if ($xs && !_is_special($bytes)) {
        my $value = _try_xs($xs, $bytes);
        return $value->[0] if $value;
    }
    return CPANBridge::JSON::Decoder::decode($bytes);
}

# Whether there may be data that the C decoder decodes in another way: surrogates and the like in UTF-8,
# integers beyond 64 bits, floats beyond the largest. A string with such text costs only
# time. One pattern for all would be fifty times slower than these.
sub _is_special {
    return CPANBridge::JSON::Decoder::has_surrogates($_[0])
        || $_[0] =~ /[0-9]{19}/
        || $_[0] =~ /[0-9][eE]\+?(?:[3-9][0-9][0-9]|[0-9]{4})/;
}

# A reference to the value; undef if the decoder refuses it: then the one in Perl reports the reason.
sub _try_xs {
    my ($decoder, $bytes) = @_;
    my $previous_error = $@;
    my $value          = eval {
        local $SIG{__DIE__};
        [ $decoder->decode($bytes) ];
    };
    die $@ if !$value && (ref $@ || $@ !~ /character offset|nesting level/);    # a signal handler's
    $@ = $previous_error;
    return $value;
}

sub _find_xs {
    return 0 if defined $ENV{CPAN_BRIDGE_JSON} && $ENV{CPAN_BRIDGE_JSON} eq 'pp';
    my $previous_error = $@;
    my $decoder        = eval {
        local ($SIG{__DIE__}, $!);
        require Cpanel::JSON::XS;
        Cpanel::JSON::XS->new->utf8->allow_nonref->max_depth(2000);
    };
    die $@ if !$decoder && (ref $@ || $@ !~ /Cpanel|require/);    # a signal handler's
    $@ = $previous_error;
    return 0 if !$decoder;
    for my $json (PROBES) {
        my $value = _try_xs($decoder, $json) or return 0;
        my $expected = CPANBridge::JSON::Decoder::decode($json);
        # The encoder distinguishes all kinds of values, and floats to the last bit.
        return 0 if encode($value->[0]) ne encode($expected);
    }
    return $decoder;
}

1;

__END__

=head1 NAME

CPANBridge::JSON - JSON as the bridge needs it

=head1 DESCRIPTION

JSON::PP is a part of Perl only since 5.14, and JSON modules alter some data: they write
floats with 15 digits, send a number as a string once it was printed, and more. So encoding is done by
L<CPANBridge::JSON::Encoder>, and decoding by L<CPANBridge::JSON::Decoder>, both in pure Perl.

Where L<Cpanel::JSON::XS> is installed it decodes replies in C, after it has shown with a few probes
that it gives the same data, and only such replies as it gives the same data for. It is loaded
once the script has received 256 KB, unless the script has loaded it anyway. L<JSON::XS> is not used:
it reads every tenth float with an error in the last digit.

=head1 FUNCTIONS

=over

=item encode($data, $name)

See L<CPANBridge::JSON::Encoder/FUNCTIONS>.

=item decode($bytes)

See L<CPANBridge::JSON::Decoder/FUNCTIONS>.

=back

=head1 ENVIRONMENT

With C<CPAN_BRIDGE_JSON=pp>, replies are decoded in pure Perl alone.

=cut
